"""Rows of a run that leave batches and join them: which a pass holds, and what is remembered of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a pass, in its order: their numbers in the run, where each one's first new token stands in the batch,
    how many tokens the cache holds before the pass, and, of new rows, whether they will join those before. A row ends
    with one of `ends`: a pass over that decides nothing, and is made only while other rows go on."""

    run: object
    numbers: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...] = ()
    n_past: int = 0
    joining: bool = False


_NOBODY = Rows(object(), (), ())


class Remembered(Generic[State]):
    """A state with a place for each row of a batch. It goes with the rows: those that other rows' prompts interrupt
    keep theirs, and those that have left are forgotten, once `left`, where it is given, was told their numbers and
    their state."""

    def __init__(self, state: State, left: Callable[[Sequence[int], State], None] | None = None) -> None:
        self.state, self.rows, self._left = state, _NOBODY, left
        self._waiting: list[tuple[tuple[int, ...], State]] = []

    def begin(self, rows: Rows | None, state: State) -> None:
        """These rows are new, and so is their state."""
        waits = rows is not None and rows.joining
        parts = [*self._waiting, (self.rows.numbers, self.state)]
        if not waits and self._left is not None:
            for numbers, own in parts:
                self._left(numbers, own)
        self._waiting = parts if waits else []
        self.state, self.rows = state, rows or _NOBODY

    def turn(self, rows: Rows | None) -> bool:
        """From here on the batch holds these rows, of those that began. Were they others before?"""
        if rows is None or rows is self.rows:
            return False
        if rows.numbers != self.rows.numbers:
            parts = [*self._waiting, (self.rows.numbers, self.state)]
            place = {number: at for at, number in enumerate(number for numbers, _ in parts for number in numbers)}
            whole = joined([state for _, state in parts])
            gone = [number for number in place if number not in rows.numbers]
            if gone and self._left is not None:
                self._left(gone, taken(whole, [place[number] for number in gone]))
            self.state = taken(whole, [place[number] for number in rows.numbers])
            self._waiting = []
        self.rows = rows
        return True


def joined(parts: Sequence[Any]) -> Any:
    """States of one kind one after another: tensors along their first dimension, lists, and what is made of them."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, list):
        return [item for part in parts for item in part]
    return _made(first, [joined(values) for values in zip(*map(_parts, parts), strict=True)])


def taken(state: Any, rows: Sequence[int]) -> Any:
    """The state of some of its rows, in this order."""
    if isinstance(state, Tensor):
        return state[torch.tensor(rows, device=state.device, dtype=torch.long)]
    if isinstance(state, list):
        return [state[row] for row in rows]
    return _made(state, [taken(part, rows) for part in _parts(state)])


def _parts(state: Any) -> list[Any]:
    if is_dataclass(state):
        return [getattr(state, field.name) for field in fields(state)]
    return list(state)


def _made(like: Any, parts: list[Any]) -> Any:
    kind: Any = type(like) if is_dataclass(like) else lambda *values: values
    return kind(*parts)
