"""Which token each row gets, inside vLLM: our own draw and our own decoding controls, as a logits processor of its.

vLLM draws by a generator's state, which depends on the card and the version; ours belongs to prompt and sample. So vLLM
is told to take the largest score, and the scores that it takes it from are those of `probes.Sampling` and the control.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from probes.generation.engine import Row
from probes.generation.sampling import Decoding, DecodingRun, Event, Sampling, row_key
from probes.generation.settings import NumbersOnly

ROW = "steer_row"  # of a request's extra_args: the number of its row
Logits = Float[Tensor, "batch d_vocab"]


@dataclass(eq=False)
class Seat:
    """A row in vLLM's batch: what it was asked, and the tokens written so far, a list that vLLM goes on filling."""

    row: Row
    written: Sequence[int]


@dataclass(eq=False)
class _Run:
    """What decides over one row alone, and how many of its tokens are decided."""

    control: DecodingRun | None
    processors: LogitsProcessorList
    decided: int = 0


@dataclass(eq=False)
class Decider:
    """Decides over rows of one call of `generate`. `seats`: by place in vLLM's batch.

    With a control, a repetition penalty, or both, each row is decided by itself, one after another.
    """

    sampling: Sampling
    decoding: Decoding | None = None
    repetition_penalty: float = 1.0
    seats: dict[int, Seat] = field(default_factory=dict)
    _runs: dict[int, _Run] = field(default_factory=dict)
    _numbers: NumbersOnly = field(default_factory=NumbersOnly)

    def apply(self, logits: Logits) -> Logits:
        """The scores, in place; the largest of a row is its token."""
        if not self.seats:
            return logits
        places = sorted(self.seats)
        at = torch.tensor(places, device=logits.device)
        scores = logits[at]
        self._numbers(at, scores.amax().reshape(1, 1))  # no number, where one of them is none
        if self.decoding is not None or self.repetition_penalty != 1:
            decided = [self._alone(self.seats[place], scores[i : i + 1]) for i, place in enumerate(places)]
            logits[at] = torch.cat(decided)
        elif self.sampling.temperature:
            logits[at] = self._drawn([self.seats[place] for place in places], scores)
        return logits

    def check(self) -> None:
        """Raise ValueError where the scores of some row were not numbers."""
        self._numbers.check([", ".join(dict.fromkeys(seat.row.name for seat in self.seats.values()))])

    def events(self, row: Row) -> tuple[Event, ...]:
        """What the control did to a row that has ended, which is forgotten."""
        run = self._runs.pop(row.number, None)
        return () if run is None or run.control is None else tuple(run.control.events()[0])

    def _drawn(self, seats: list[Seat], scores: Logits) -> Logits:
        counts = [len(seat.written) for seat in seats]
        width = max(counts)
        draw = self.sampling.processors(
            [self._key(seat.row) for seat in seats], [width - count for count in counts], scores.device
        )
        return draw(torch.empty(len(seats), width, dtype=torch.long, device=scores.device), scores)  # type: ignore[arg-type]

    def _alone(self, seat: Seat, scores: Logits) -> Logits:
        n, run = len(seat.written), self._runs.get(seat.row.number)
        if run is None:
            run = self._runs[seat.row.number] = self._begin(seat.row, scores.device)
        if run.decided != n:
            raise RuntimeError(
                f"vLLM asks for token {n} of the row {seat.row.name!r}, of which {run.decided} are decided: it "
                "schedules in a way that decoding controls do not know. Leave enable_chunked_prefill off."
            )
        run.decided += 1
        ids: Any = torch.tensor([[*seat.row.prompt, *seat.written]], device=scores.device)
        return run.processors(ids, scores)

    def _begin(self, row: Row, device: torch.device) -> _Run:
        draw = self.sampling.processors([self._key(row)], [len(row.prompt)], device)
        mask = torch.ones(1, len(row.prompt), dtype=torch.long, device=device)
        control = None if self.decoding is None else self.decoding.begin(mask)
        own = draw if control is None else control.processors(draw)
        penalty = [] if self.repetition_penalty == 1 else [RepetitionPenaltyLogitsProcessor(self.repetition_penalty)]
        return _Run(control, LogitsProcessorList([*penalty, *own]))

    def _key(self, row: Row) -> int:
        seed = self.sampling.seed if row.seed is None else row.seed
        return row_key(list(row.prompt), seed, row.sample)


@dataclass(eq=False)
class Table:
    """Where vLLM's processor, which it makes itself, finds the decider and the rows of now."""

    decider: Decider | None = None
    rows: dict[int, Row] = field(default_factory=dict)

    def update(self, batch: Any) -> None:
        """vLLM's batch has changed (its `BatchUpdate`): some have left, some have come, some have moved."""
        if batch is None or self.decider is None:
            return
        seats = self.decider.seats
        for place in batch.removed:
            seats.pop(place, None)
        for place, params, _, written in batch.added:
            number = (params.extra_args or {}).get(ROW)
            seats.pop(place, None)
            if number in self.rows:
                seats[place] = Seat(self.rows[number], written)
        for one, other, direction in batch.moved:
            moved = {other: seats.pop(one, None)}
            if direction.name == "SWAP":
                moved[one] = seats.pop(other, None)
            seats.pop(other, None)
            seats.update({place: seat for place, seat in moved.items() if seat is not None})


TABLE = Table()  # vLLM makes its processor where nothing can be handed to it: one model a process


@cache
def processor_class() -> type:
    """The logits processor, as vLLM takes one. Raises ImportError where vLLM is not installed."""
    from vllm.v1.sample.logits_processor import LogitsProcessor

    def __init__(self: Any, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:  # noqa: ARG001
        pass

    def apply(self: Any, logits: Tensor) -> Tensor:  # noqa: ARG001
        return logits if TABLE.decider is None else TABLE.decider.apply(logits)

    def is_argmax_invariant(self: Any) -> bool:  # noqa: ARG001
        return False

    def update_state(self: Any, batch_update: Any) -> None:  # noqa: ARG001
        TABLE.update(batch_update)

    methods = (__init__, apply, is_argmax_invariant, update_state)
    return type("Deciding", (LogitsProcessor,), {method.__name__: method for method in methods})
