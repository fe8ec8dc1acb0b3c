"""Where each row of a batch is while it is being written: in its thinking or not, and how far."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.generation.sampling import Event
from probes.model.delimiters import Delimiters
from probes.needles import Needle
from probes.rows import Remembered, Rows
from probes.thinking.phases import Clock

Ids = Int[Tensor, "batch pos"]
Scores = Float[Tensor, "batch d_vocab"]
Where = Bool[Tensor, " batch"]

_THINKING, _ANSWER = 1, 2


class DecodingState:
    """State of one run, a number or a truth for each row, on the device; nothing is copied to the host before `events`.

    The thinking is that of `probes.model.tokens.thinking_span`: from the first opening delimiter of the turn to the
    closing one after it. What is written before or after it is solution, a second block of thinking included.

    - `opened`, `closed`, `done`: the thinking has begun, has ended, the row has ended; `thinking`: it is in between.
    - `thoughts`: tokens generated since the thinking was opened. `said`: tokens generated outside the thinking, since
      it was closed or, until it is opened, since the row began.
    - `opening`, `closing`: how many tokens of that delimiter have just been written, less than all (letters, where it
      is found by its text); `open` and `close`: the token that goes on from there.
    - `shut`: the closing delimiter is being written for the row. `taken`: its next token is decided; who comes later
      leaves it alone.

    Rows leave, and others join (`turn`). What a control remembers of a row goes with it once it is handed to `keep`.

    >>> import torch
    >>> from probes.model import Delimiters
    >>> from steer.decoding import DecodingState
    >>> state = DecodingState(Delimiters(open=(3,), close=(4,)), ends=[2], mask=torch.ones(1, 2, dtype=torch.long))
    >>> for n in (2, 3, 4, 5):  # the prompt, then three tokens, of which the first opens the thinking
    ...     state.follow(torch.tensor([[6, 7, 3, 8, 9]])[:, :n])
    >>> state.thinking, state.thoughts
    (tensor([True]), tensor([2]))
    """

    opened: Where
    closed: Where
    done: Where
    taken: Where
    shut: Where
    thoughts: Int[Tensor, " batch"]
    said: Int[Tensor, " batch"]
    opening: Int[Tensor, " batch"]
    closing: Int[Tensor, " batch"]
    _told: Where
    _events: list[list[Event]]

    def __init__(self, delimiters: Delimiters, ends: Sequence[int], mask: Int[Tensor, "batch pos"]) -> None:
        self.delimiters, self.mask = delimiters, mask
        opens, closes = delimiters.open_text, delimiters.close_text
        self.open, self.close, self.ends = (
            torch.tensor(ids, device=mask.device)
            for ids in (
                delimiters.open if opens is None else opens.writes,
                delimiters.close if closes is None else closes.writes,
                ends,
            )
        )
        self._clock = Clock(delimiters)
        self._noted: list[tuple[str, int, Where]] = []
        self._kept: list[tuple[Any, str, Callable[[], Any]]] = []
        self._memory: Remembered[tuple[Any, ...]] = Remembered(())
        self._rows: Rows | None = None
        self._fresh = True
        self.device, self.batch, self._begins = mask.device, len(mask), (mask.shape[1],) * len(mask)
        for name in ("opened", "closed", "done", "taken", "shut", "_told"):
            self.keep(self, name, self.no)
        for name in ("thoughts", "said", "opening", "closing"):
            self.keep(self, name, self.zeros)
        self.keep(self, "_events", lambda: [[] for _ in range(self.batch)])
        self._column = mask.shape[1]

    @property
    def steps(self) -> list[int]:
        """Of each row the number of the token that is being decided."""
        return [self._column - begin for begin in self._begins]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of each row its number in the run."""
        return tuple(range(self.batch)) if self._rows is None else self._rows.numbers

    def no(self) -> Where:
        """False for each row."""
        return torch.zeros(self.batch, dtype=torch.bool, device=self.device)

    def zeros(self) -> Int[Tensor, " batch"]:
        """0 for each row."""
        return torch.zeros(self.batch, dtype=torch.long, device=self.device)

    def keep(self, owner: object, name: str, fresh: Callable[[], Tensor | list[Any]]) -> None:
        """Set an attribute, with a place for each row, that goes with the rows; `fresh` makes it for new ones."""
        self._kept.append((owner, name, fresh))
        setattr(owner, name, fresh())

    def turn(self, rows: Rows, mask: Int[Tensor, "batch pos"] | None) -> None:
        """From here on the rows are these: new ones, with these prompts, or some that began before."""
        self._flushed()
        self._memory.state = tuple(getattr(owner, name) for owner, name, _ in self._kept)
        self.batch, self._begins, self._rows, self._fresh = len(rows.numbers), rows.begins, rows, mask is not None
        if mask is None:
            self._memory.turn(rows)
        else:
            self.mask = mask
            self._memory.begin(rows, tuple(fresh() for _, _, fresh in self._kept))
        for (owner, name, _), value in zip(self._kept, self._memory.state, strict=True):
            setattr(owner, name, value)

    @property
    def thinking(self) -> Where:
        """Rows that are in their thinking."""
        return self.opened & ~self.closed & ~self.done

    @property
    def free(self) -> Where:
        """Rows that go on, and whose next token nobody has decided."""
        return ~self.done & ~self.taken

    def follow(self, ids: Ids) -> None:
        """Take in the prompts at the first call, the newest token of each row after it."""
        self._column, self.taken = ids.shape[1], torch.zeros_like(self.taken)
        if self._fresh:
            self._begin(ids)
        else:
            self._advance(ids)
        self._fresh = False
        d = self.delimiters
        opening, _ = _partial(ids, d.open, d.open_text)
        closing, self._bits = _partial(ids, d.close, d.close_text)
        self.opening, self.closing = opening.masked_fill(self.opened, 0), closing.masked_fill(~self.thinking, 0)

    def _begin(self, ids: Ids) -> None:
        phase = self._clock.advance(ids, self.mask, 0, self._rows).phase
        self.opened = phase[:, -1] == _THINKING
        if self.delimiters.turn:  # else a block that is closed may belong to an earlier turn
            self.opened = (phase == _THINKING).any(1)
            self.closed = self.opened & (phase[:, -1] == _ANSWER)

    def _advance(self, ids: Ids) -> None:
        phase = self._clock.advance(ids[:, -1:], None, ids.shape[1] - 1, self._rows).phase[:, -1]
        live, thought = ~self.done, self.thinking
        self.opened = self.opened | (phase == _THINKING)
        self.thoughts = self.thoughts + thought
        self.said = (self.said + (live & ~thought)).masked_fill(~thought & self.thinking, 0)
        self.closed = self.closed | (self.opened & (phase == _ANSWER))
        self.done = self.done | torch.isin(ids[:, -1], self.ends)

    def would_close(self, scores: Scores) -> Where:
        """Rows whose drawn token ends their thinking: it begins the closing delimiter, or ends the row."""
        drawn = scores.argmax(1)
        return self.thinking & (self._closes(drawn[:, None])[:, 0] | torch.isin(drawn, self.ends))

    def closing_added(self, scores: Scores, where: Where, amount: float) -> Scores:
        """`amount` added, in some of the rows, to the tokens that would begin the closing delimiter; infinitely little
        also to those that would complete one that was begun before."""
        ids = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
        closes = self._closes(ids)
        if amount == -math.inf:
            closes = closes | self._completes(ids)
        return torch.where(closes & (where & self.thinking)[:, None], scores + amount, scores)

    def _closes(self, ids: Int[Tensor, "batch n"]) -> Bool[Tensor, "batch n"]:
        """With which tokens it is decided to close: the first of a delimiter, or the first letters of its text."""
        if (needle := self.delimiters.close_text) is None:
            return (ids == self.close[0]) & (self.closing == 0)[:, None]
        return needle.begun(self._bits[:, None].expand_as(ids), ids)

    def _completes(self, ids: Int[Tensor, "batch n"]) -> Bool[Tensor, "batch n"]:
        if (needle := self.delimiters.close_text) is None:
            return (ids == self.close[-1]) & (self.closing == len(self.close) - 1)[:, None]
        return needle.completed(self._bits[:, None].expand_as(ids), ids)

    def force(self, scores: Scores, where: Where, token: Int[Tensor, " batch"]) -> Scores:
        """These rows write this token."""
        self.taken = self.taken | where
        only = torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)
        return only.where(where[:, None], scores)

    def end_thinking(self, scores: Scores, where: Where) -> Scores:
        """These rows write the closing delimiter, token by token from now on, or the rest of it."""
        token = self.close[self.closing]
        overruled = where & (scores.argmax(1) != token)
        self.note("close", overruled & ~self._told)
        self._told, self.shut = self._told | overruled, self.shut | where
        return self.force(scores, where, token)

    def note(self, kind: str, where: Where, *, back: int = 0) -> None:
        """Something was done to these rows, at the token being decided or `back` tokens before it."""
        self._noted.append((kind, self._column - back, where))

    def events(self) -> list[tuple[Event, ...]]:
        """Of each row what was noted, in the order of the tokens."""
        self._flushed()
        return [tuple(sorted(events, key=lambda event: event[1])) for events in self._events]

    def _flushed(self) -> None:
        """What was noted since rows last moved comes from the device, to each row's own list."""
        if self._noted:
            told = torch.stack([where for _, _, where in self._noted]).nonzero().tolist()
            self._events = [list(events) for events in self._events]
            for number, row in told:
                kind, column, _ = self._noted[number]
                self._events[row].append((kind, column - self._begins[row]))
            self._noted = []


def added(scores: Scores, tokens: Tensor, where: Where, amount: float) -> Scores:
    """`amount` added to the scores of some tokens in some rows."""
    logits = scores[:, tokens]
    return scores.index_copy(1, tokens, torch.where(where[:, None], logits + amount, logits))


def _partial(
    ids: Ids, wanted: tuple[int, ...], needle: Needle | None
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """How many tokens of `wanted`, from its first on but not all, end each row; of a text, how many letters, and the
    bits that say so."""
    if needle is not None:
        bits = needle.ending(ids)
        return needle.partial(bits), bits
    found = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    for n in range(1, min(len(wanted), ids.shape[1] + 1)):
        hit = torch.stack([ids[:, i - n] == token for i, token in enumerate(wanted[:n])]).all(0)
        found = found.masked_fill(hit, n)
    return found, found
