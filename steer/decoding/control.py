"""Decoding controls at work: how a control is put beside the draw of tokens, and the log of what it did."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from probes.generation._batch import end_ids
from probes.generation.completions import Completion
from probes.generation.sampling import Event
from probes.model.loading import delimiters_of
from probes.rows import Rows
from probes.tables import Brief, Shown, Table
from steer.decoding.state import DecodingState, Ids, Scores


@dataclass(frozen=True)
class Processors:
    """Of one run: `before` the draw they change the distribution, `after` it they see the drawn token (the argmax).

    With `turns`, rows may leave their batch and others join: what they remember of a row they hand to the state's
    `keep`, or they remember nothing. Without, a batch is written to its end before the next begins. Each of `listens`
    makes a context that is open while the run lasts, in which they may read the model's passes.

    >>> from transformers import MinPLogitsWarper
    >>> from steer.decoding import Processors
    >>> len(Processors(before=(MinPLogitsWarper(0.1),)).before)
    1
    """

    before: tuple[LogitsProcessor, ...] = ()
    after: tuple[LogitsProcessor, ...] = ()
    turns: bool = False
    listens: tuple[Callable[[], AbstractContextManager[None]], ...] = ()


@runtime_checkable
class DecodingControl(Protocol):
    """A rule that decides over tokens beside the model. It sees tokens, and what it listens to in the model's passes:
    no answer, no problem.

    >>> from dataclasses import dataclass
    >>> from transformers import MinPLogitsWarper
    >>> from steer.decoding import DecodingControl, Processors
    >>> @dataclass(frozen=True)
    ... class MinP:
    ...     share: float
    ...     def processors(self, model, rows):
    ...         return Processors(before=(MinPLogitsWarper(self.share),))
    >>> isinstance(MinP(0.1), DecodingControl)
    True
    """

    def processors(self, model: PreTrainedModel, rows: DecodingState) -> Processors:
        """The processors of one run, whose rows they may read."""


@dataclass(frozen=True)
class Together:
    """Several controls on one run. Where two would decide one token, the earlier does: budgets go first.

    >>> from probes import generate, load
    >>> from steer.decoding import Budget, BudgetForcing, Controlled, Together
    >>> model, control = load("organism"), Together((Budget(thinking=14), BudgetForcing(9)))
    >>> completion = generate(model, ["a 3 b +4 c *7"], decoding=Controlled(model, control))[0]
    >>> completion.thinking
    'Okay a =3 b +4 =7 c *7 =9 Wait c *7 =9 Wait'
    """

    controls: tuple[DecodingControl, ...]

    def processors(self, model: PreTrainedModel, rows: DecodingState) -> Processors:
        """The processors of one run: of each control in turn."""
        parts = [control.processors(model, rows) for control in self.controls]
        return Processors(
            tuple(p for part in parts for p in part.before),
            tuple(p for part in parts for p in part.after),
            all(part.turns for part in parts),
            tuple(listen for part in parts for listen in part.listens),
        )

    def __str__(self) -> str:
        return " + ".join(map(str, self.controls))


@dataclass(frozen=True, eq=False, repr=False)
class Controlled(Brief):
    """A control on a model, as `probes.generation.generate(..., decoding=...)` takes it.

    Raises ValueError, when a run begins, where the model has no thinking delimiters.

    >>> from probes import generate, load
    >>> from steer.decoding import Budget, Controlled
    >>> model = load("organism")
    >>> completion = generate(model, ["a 3 b +4 c *7"], decoding=Controlled(model, Budget(thinking=8)))[0]
    >>> completion.decoding, completion.events
    ('Budget(thinking=8, solution=None)', (('close', 9),))
    """

    model: PreTrainedModel
    control: DecodingControl

    @property
    def name(self) -> str:
        """The control, in the words that its completions keep."""
        return str(self.control)

    def begin(self, mask: Int[Tensor, "batch pos"]) -> "_Run":
        """A run on a batch of prompts, padded on the left where `mask` is 0."""
        rows = DecodingState(delimiters_of(self.model), end_ids(self.model), mask)
        processors = self.control.processors(self.model, rows)
        return (_Turning if processors.turns else _Run)(rows, processors)


@dataclass(frozen=True, eq=False)
class _Run:
    rows: DecodingState
    control: Processors

    def processors(self, draw: LogitsProcessorList) -> LogitsProcessorList:
        return LogitsProcessorList([_Follow(self.rows), *self.control.before, *draw, *self.control.after])

    def events(self) -> list[tuple[Event, ...]]:
        return self.rows.events()

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as stack:
            for listen in self.control.listens:
                stack.enter_context(listen())
            yield


@dataclass(frozen=True, eq=False)
class _Turning(_Run):
    def turn(self, rows: Rows, mask: Int[Tensor, "batch pos"] | None) -> None:
        self.rows.turn(rows, mask)


class _Follow(LogitsProcessor):
    """Keeps the rows up to date; changes nothing."""

    def __init__(self, rows: DecodingState) -> None:
        self.rows = rows

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        self.rows.follow(input_ids)
        return scores


@dataclass(frozen=True, repr=False)
class ControlLog(Shown):
    """What a control did to each completion: what kind of thing, at which of the generated tokens.

    Kinds: `close`, the closing delimiter was forced; `insert`, a marker was inserted; `guide`, words were written
    before a forced close; `open`, an opening delimiter was completed; `cut`, the solution was ended. Only what
    overruled the drawn token is noted. It is kept with the completions, so that a resumed run has it whole.

    >>> from probes import generate, load
    >>> from steer.decoding import BudgetForcing, Controlled, ControlLog
    >>> model = load("organism")
    >>> completions = generate(model, ["a 3 b +4 c *7"], decoding=Controlled(model, BudgetForcing(2)))
    >>> ControlLog.of(completions).positions("insert")
    {('0', 0): (10, 14)}
    """

    control: str
    events: dict[tuple[str, int], tuple[Event, ...]]

    @classmethod
    def of(cls, completions: Iterable[Completion]) -> "ControlLog":
        """Raises ValueError where the completions were not written under one control."""
        rows = list(completions)
        names = sorted({c.decoding for c in rows})
        if len(names) != 1 or not names[0]:
            told = ", ".join(name or "no control" for name in names) or "nothing"
            raise ValueError(f"A log is of completions under one control, but these were written under {told}.")
        return cls(names[0], {(c.id, c.sample): c.events for c in rows})

    def positions(self, kind: str) -> dict[tuple[str, int], tuple[int, ...]]:
        """By id and sample, where something of a kind was done."""
        return {row: tuple(at for k, at in events if k == kind) for row, events in self.events.items()}

    def counts(self) -> Counter[str]:
        """How many times something of each kind was done."""
        return Counter(kind for events in self.events.values() for kind, _ in events)

    def table(self) -> Table:
        """A row for each kind: how many times, in how many of the completions, and where first."""
        rows = []
        for kind, count in sorted(self.counts().items()):
            touched: Sequence[tuple[int, ...]] = [at for at in self.positions(kind).values() if at]
            first = sum(at[0] for at in touched) / len(touched)
            rows.append((kind, count, len(touched), len(self.events), first))
        return Table(("event", "times", "completions", "of", "first at token, mean"), tuple(rows), self.control)
