"""Where the regions lie that keys are chosen from: the phase of each past token, in the columns of a cache."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probes.generation.caches import widened
from probes.rows import Remembered
from probes.thinking.phases import Phases
from steer.interventions.attention import Attend

Place = tuple[str, int, int | None]  # a phase, and a window of its tokens


def place_of(edit: Attend) -> Place:
    return edit.keys, edit.first, edit.last


class Regions:
    """Which columns of each row's keys are in each of some places, told pass by pass.

    A column is a token of the batch, pads among them, as the cache holds it: rows that leave and join take theirs
    along, and are wider or narrower by pads on the left.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = list(dict.fromkeys(places))
        self._columns = torch.zeros(0, 1 + len(self.places), 0, dtype=torch.bool)  # the first says which are real
        self._answered = torch.zeros(0, dtype=torch.long)  # how many tokens of the answer each row has
        self._memory: Remembered[tuple[list[Tensor], Tensor]] = Remembered(([], self._answered))

    @property
    def needs_phases(self) -> bool:
        """Is there a place that takes to know where the prompt ends?"""
        return any(phase != "prompt" or last is None for phase, _, last in self.places)

    def begin(self, phases: Phases) -> None:
        """A new pass: its tokens are keys, too."""
        self._turn(phases)
        opened = phases.opens.any(1)
        answers = phases.mask("answer").cumsum(1) + (self._answered * ~opened)[:, None]
        new = self._chosen(phases, answers - 1)
        past = self._columns
        if past.shape[2]:
            past = past.where(~opened[:, None, None], self._asked(past[:, 0]))  # what was said before a turn is asked
        self._columns, self._answered = torch.cat([past, new], dim=2), answers[:, -1]

    def keys(self, place: Place, n: int) -> Bool[Tensor, "batch keys"]:
        """The columns of a layer's `n` keys that are in a place: the last, where it has forgotten some (a sliding
        window), and the first, where it has room for more (a static cache)."""
        own = self._columns[:, 1 + self.places.index(place)]
        total = own.shape[1]
        return own[:, total - n :] if n <= total else torch.nn.functional.pad(own, (0, n - total), value=False)

    def _turn(self, phases: Phases) -> None:
        rows, batch = phases.rows, len(phases.real)
        if not phases.starts and (rows is None or rows is self._memory.rows):
            return
        self._memory.state = (list(self._columns.unbind(0)), self._answered)
        if phases.starts:
            self._columns = phases.real.new_zeros(batch, 1 + len(self.places), 0)
            self._answered = phases.position.new_zeros(batch)
            self._memory.begin(rows, ([], self._answered))
        elif self._memory.turn(rows) and rows is not None:
            columns, self._answered = self._memory.state
            self._columns = torch.stack([widened(own, rows.n_past, 0) for own in columns])

    def _chosen(self, phases: Phases, answer: Int[Tensor, "batch new"]) -> Bool[Tensor, "batch kinds new"]:
        counts = {"prompt": phases.position, "thinking": phases.thought, "answer": answer}
        own = [phases.mask(name) & _within(counts[name], first, last) for name, first, last in self.places]
        return torch.stack([phases.real, *own], dim=1)

    def _asked(self, real: Bool[Tensor, "batch past"]) -> Bool[Tensor, "batch kinds past"]:
        position, none = real.cumsum(1) - 1, torch.zeros_like(real)
        own = [real & _within(position, first, last) if name == "prompt" else none for name, first, last in self.places]
        return torch.stack([real, *own], dim=1)


def _within(count: Int[Tensor, "batch new"], first: int, last: int | None) -> Bool[Tensor, "batch new"]:
    return count >= first if last is None else (count >= first) & (count < last)
