"""Of several samples of a prompt, go on with the one whose chain looks best after a few steps; end the others."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from probes.activations._meter import Follower, Meter, Trajectory
from probes.activations.trajectories import SEGMENT, check_cached, read_trajectories
from probes.generation.completions import Completion
from probes.generation.sampling import CUT
from probes.model.hooks import hook_inputs
from probes.thinking.phases import Clock
from probes.words import checked
from steer.decoding.control import Processors
from steer.decoding.state import DecodingState, Ids, Scores

PRUNED = "prune"


@checked
@dataclass(frozen=True)
class Prune:
    """Early path selection *(Vilas et al. 2025)*: of each prompt's `samples`, the chain with the largest net change, or
    the smallest cumulative one, after `step` steps of `segment` tokens is written on. The others are ended.

    It is decided when all samples of a prompt have come to step `step`, which takes `step` + 1 segments of thinking, or
    have ended; a chain that ended before is not chosen, unless all did. What is pruned leaves batch and cache, and
    counts as truncated. Give `generate` as many samples; raises ValueError in a run where it has others, or no cache.
    Where rows cannot join a batch that runs, a prompt whose samples are in two of them is not pruned: give a batch size
    that is a multiple of `samples`. The paper fits a forest to both changes at step 4: fit what
    `probes.activations.Trajectory.after` gives, to choose by it among chains that are there.

    >>> from probes import Sampling, generate, load
    >>> from steer.decoding import Controlled, Prune, selected
    >>> model, sampling = load("organism"), Sampling(temperature=1.0, max_new_tokens=48)
    >>> prune = Prune(samples=4, step=1, segment=3)
    >>> prompts, decoding = ["a 3 b +4 c *7 d -2"], Controlled(model, prune)
    >>> completions = generate(model, prompts, samples=4, sampling=sampling, decoding=decoding)
    >>> [c.thinking_tokens for c in completions], [c.sample for c in selected(model, completions, prune)]
    ([14, 3, 6, 6], [0])
    """

    samples: int
    step: int = 4
    segment: int = SEGMENT
    by: Literal["net", "cumulative"] = "net"

    def __post_init__(self) -> None:
        if self.samples < 2 or self.step < 1 or self.segment < 1:
            raise ValueError(
                "Pruning needs 2 samples or more, a step from 1 on and segments of 1 token or more, but got samples="
                f"{self.samples}, step={self.step}, segment={self.segment}."
            )

    def worth(self, changes: Mapping[str, float]) -> float:
        """Of the changes of a chain after some steps; of one that has none, the least."""
        value = changes[self.by]
        return -math.inf if math.isnan(value) else -value if self.by == "cumulative" else value

    def processors(self, model: PreTrainedModel, rows: DecodingState) -> Processors:
        """The processors of one run."""
        pruning = _Pruning(self, model, rows)
        return Processors(after=(pruning,), turns=True, listens=(pruning.listening,))


def selected(model: PreTrainedModel, completions: Sequence[Completion], control: Prune) -> list[Completion]:
    """Of each prompt the completion that was gone on with: of those that were not pruned the one whose chain is best.

    >>> from probes import generate, load
    >>> from steer.decoding import Prune, selected
    >>> model = load("organism")
    >>> completions = generate(model, ["a 3 b +4"], samples=2)
    >>> [c.sample for c in selected(model, completions, Prune(samples=2, step=1, segment=3))]
    [0]
    """
    groups: dict[str, list[Completion]] = {}
    for c in completions:
        if not any(kind == PRUNED for kind, _ in c.events):
            groups.setdefault(c.id, []).append(c)
    left = [c for group in groups.values() for c in group]
    chains = iter(read_trajectories(model, left, segment=control.segment))
    worth = {(c.id, c.sample): control.worth(next(chains).after(control.step)) for c in left}
    return [max(group, key=lambda c: worth[c.id, c.sample]) for group in groups.values()]


class _Pruning(LogitsProcessor):
    """Of each row of the run, by its number: what its chain was worth, and whether that is known."""

    def __init__(self, control: Prune, model: PreTrainedModel, rows: DecodingState) -> None:
        check_cached(model)
        self.control, self.model, self.rows = control, model, rows
        self.meter = Meter(model, control.segment, control.step)
        self.follower = Follower(self.meter, Clock.of(model), _forget)
        self.value = torch.zeros(0, dtype=self.meter.exact, device=rows.device)
        self.known = torch.zeros(0, dtype=torch.bool, device=rows.device)
        self.present: tuple[int, ...] = ()
        self.begun: set[int] = set()
        self.numbers = torch.zeros(0, dtype=torch.long, device=rows.device)

    @contextmanager
    def listening(self) -> Iterator[None]:
        with hook_inputs(self.model, self.follower.see), self.meter.listening():
            yield

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        rows, many = self.rows, self.control.samples
        self._now(rows.numbers, input_ids)
        self.follower.settle()
        chains = self.follower.chains
        reached = (chains.segments > self.control.step).to(rows.device)
        value = (
            chains.steps[:, ("net", "cumulative").index(self.control.by), self.control.step - 1]
            .mean(-1)
            .to(rows.device)
        )
        value = -value if self.control.by == "cumulative" else value
        self.value[self.numbers] = value.where(reached, -torch.inf)
        self.known[self.numbers] |= reached | rows.done
        decided = self.known.unflatten(0, (-1, many)).all(1)
        best = self.value.unflatten(0, (-1, many)).argmax(1)
        loses = decided[self.numbers // many] & (self.numbers % many != best[self.numbers // many])
        where = loses & rows.free
        rows.note(PRUNED, where)
        rows.note(CUT, where)
        return rows.force(scores, where, rows.ends[0].expand(len(scores)))

    def _now(self, numbers: tuple[int, ...], ids: Ids) -> None:
        """These rows are in the pass; of those that were and are no more it is known that they have ended."""
        if numbers == self.present:
            return
        many = self.control.samples
        size = many * (1 + max((*numbers, len(self.known) - 1)) // many)
        more = size - len(self.known)
        self.value = torch.cat([self.value, self.value.new_full((more,), -torch.inf)])
        self.known = torch.cat([self.known, self.known.new_zeros(more)])
        if not any(self.rows.steps):
            _check(numbers, ids, many)
        else:
            gone = sorted(self.begun - set(numbers))
            self.known[torch.tensor(gone, dtype=torch.long, device=self.known.device)] = True
        self.begun |= set(numbers)
        self.present, self.numbers = numbers, torch.tensor(numbers, device=self.known.device)


def _check(numbers: tuple[int, ...], ids: Ids, many: int) -> None:
    """Are the rows of a group samples of one prompt? Of rows that begin, which are padded alike."""
    first: dict[int, Tensor] = {}
    for number, row in zip(numbers, ids, strict=True):
        if not torch.equal(first.setdefault(number // many, row), row):
            raise ValueError(
                f"Rows are pruned as {many} samples of each prompt, but the run has another number: give "
                f"generate(..., samples={many}), or Prune the number that it has."
            )


def _forget(_numbers: Sequence[int], _chains: list[Trajectory]) -> None:
    """What is known of rows that have left was noted before."""
