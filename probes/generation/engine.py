"""What writes tokens: token ids in, token ids out, wherever the forward pass runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from transformers import PreTrainedModel

from probes.generation.sampling import Decoding, Event, Sampling


@dataclass(frozen=True)
class Row:
    """A sample of a prompt that is to be written: its number in the run, its name, its prompt. Its seed and its limit
    are the sampling's, unless it has its own.

    >>> from probes import Sampling
    >>> from probes.engines import Row
    >>> Row(number=0, name="sum", sample=0, prompt=(1, 6, 17, 5)).limit(Sampling(max_new_tokens=48))
    48
    """

    number: int
    name: str
    sample: int
    prompt: tuple[int, ...]
    seed: int | None = None
    max_new_tokens: int | None = None

    def limit(self, sampling: Sampling) -> int:
        """How many new tokens it may have."""
        return sampling.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True)
class Written:
    """A row with its new tokens, what stands after its end included, and what a decoding did to it.

    >>> from probes.engines import Row, Written
    >>> Written(Row(0, "sum", 0, (1, 6, 17, 5)), ids=[3, 56, 2]).ids
    [3, 56, 2]
    """

    row: Row
    ids: list[int]
    events: tuple[Event, ...] = ()


@runtime_checkable
class Engine(Protocol):
    """What `generate(..., engine=...)` and `evaluate(..., engine=...)` write with; without one, transformers.

    `model` is the model as transformers has it: it tells tokens, delimiters and the recipes that are applied
    (`probes.model.edits_of`), and need not run. An engine that cannot write as it is asked refuses in `check`, which is
    called before anything is written; it never writes otherwise. A store keeps the engine's `name` with its rows.

    >>> from probes import generate, load
    >>> from probes.engines import Engine, Written
    >>> class Parrot:
    ...     name = "parrot"
    ...     def check(self, model, sampling, decoding):
    ...         pass
    ...     def write(self, model, rows, sampling, decoding, *, batch_size, run):
    ...         yield [Written(row, [*row.prompt[1:3], 2]) for row in rows]  # and the end
    >>> isinstance(Parrot(), Engine), generate(load("organism"), ["a 3 b +4"], engine=Parrot())[0].answer
    (True, 'a 3')
    """

    @property
    def name(self) -> str:
        """What tells its rows from those of another, such as its version."""

    def check(self, model: PreTrainedModel, sampling: Sampling, decoding: Decoding | None) -> None:
        """Raise ValueError, with a sentence, where it cannot write with this model, so drawn and so decided."""

    def write(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        sampling: Sampling,
        decoding: Decoding | None,
        *,
        batch_size: int,
        run: object,
    ) -> Iterator[list[Written]]:
        """The rows as they end, in any order, each once. `run` names the call of `generate` that they belong to."""
