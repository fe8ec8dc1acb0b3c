"""What every table of the reasoner shares: its problems, a store that resumes, arms, and how they are told."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel

from probes import Sampling, load
from probes.generation import Completion
from probes.model import fingerprint
from probes.tables import Table
from steer import Recipe, applied, evaluate, task_named
from steer.decoding import DecodingControl, PromptStyle
from steer.deltas import WeightDelta, dialled
from steer.evaluation import Evaluation, interval_of_mean, solve
from steer.methods.thinkedit import LengthSplit
from steer.tasks import Problem, Task

LIMIT = 260  # new tokens; the longest chains that it was taught are shorter
DRAWS = 3
Draw = None | Recipe | DecodingControl | PromptStyle | WeightDelta | tuple[WeightDelta, float]


@dataclass(frozen=True)
class Bench:
    """A model, its problems, and the folder where completions are kept: what it holds is not made again."""

    model: PreTrainedModel
    task: Task
    n: int
    batch_size: int
    folder: Path

    @classmethod
    def of(cls, options: argparse.Namespace, name: str = "reasoner", task: str = "stories") -> "Bench":
        torch.set_num_threads(options.threads)
        model = load(name, dtype=getattr(torch, options.dtype)).to(options.device)
        folder = options.store / f"{name}-{task}-{options.dtype}-{options.n}"
        folder.mkdir(parents=True, exist_ok=True)
        return cls(model, task_named(task), options.n, options.batch_size, folder)

    @cached_property
    def sampling(self) -> Sampling:
        return Sampling.of(self.model, max_new_tokens=LIMIT)

    @cached_property
    def problems(self) -> list[Problem]:
        return self.task.sample(self.n, "report")

    @cached_property
    def few(self) -> list[Problem]:
        """What a choice is made on."""
        return self.task.sample(self.n // 2, "select")

    @cached_property
    def probed(self) -> list[Completion]:
        return self.solved("probed", self.task.sample(self.n, "probe"))

    @cached_property
    def split(self) -> LengthSplit:
        return LengthSplit.by_quantile(self.probed)

    @cached_property
    def plain(self) -> list[Completion]:
        return self.solved("plain", self.problems)

    def solved(
        self, name: str, problems: Sequence[Problem], draw: Draw = None, *, samples: int = 1
    ) -> list[Completion]:
        """One draw: the model as it is, with a recipe, under a control, otherwise prompted, or with other weights."""
        with self.under(draw):
            clean = "".join(c if c.isalnum() or c in "+-." else "_" for c in name)
            return solve(
                self.model, problems, sampling=self.sampling, samples=samples, batch_size=self.batch_size,
                control=draw if isinstance(draw, DecodingControl) and not isinstance(draw, Recipe) else None,
                style=draw if isinstance(draw, PromptStyle) else PromptStyle(),
                store=self.folder / f"{clean}-{fingerprint(self.model)}.jsonl", grader=self.task.grader, label=name,
            )  # fmt: skip

    @contextmanager
    def under(self, draw: Draw, *, must_fire: bool = True) -> Iterator[None]:
        """The model with a recipe at work, or with other weights; as it is for all other draws."""
        with ExitStack() as stack:
            if isinstance(draw, Recipe):
                stack.enter_context(applied(self.model, draw, must_run=False, must_fire=must_fire))
            elif isinstance(draw, WeightDelta | tuple):
                delta, strength = draw if isinstance(draw, tuple) else (draw, 1.0)
                stack.enter_context(dialled(self.model, delta, strength))
            yield

    def pooled(self, name: str, make: Callable[[int], Draw], draws: int = DRAWS) -> list[Completion]:
        """A null of several draws that share the problems out among them, so that they are n together."""
        parts = [self.solved(f"{name} {i}", self.problems[i::draws], make(i)) for i in range(draws)]
        own = {completion.id: completion for part in parts for completion in part}
        return [own[problem.id] for problem in self.problems]

    def report(self, arms: Mapping[str, Draw | list[Completion]]) -> Evaluation:
        """Every arm on the report split, beside the plain model."""
        made = {
            name: arm if isinstance(arm, list) else self.solved(name, self.problems, arm) for name, arm in arms.items()
        }
        return evaluate(self.model, self.task, self.problems, made, baseline=self.plain, sampling=self.sampling)

    def choose(self, arms: Mapping[str, Draw]) -> tuple[str, Evaluation]:
        """The most accurate on the selection split."""
        made = {name: self.solved(f"select {name}", self.few, arm) for name, arm in arms.items()}
        plain = self.solved("select plain", self.few)
        found = evaluate(self.model, self.task, self.few, made, baseline=plain, sampling=self.sampling)
        return max(arms, key=lambda name: found.score(name).accuracy), found

    def asked_otherwise(self, name: str, change: Callable[[Problem], str]) -> list[Completion]:
        return self.solved(name, [replace(problem, question=change(problem)) for problem in self.problems])


def told(title: str, report: Evaluation) -> dict:
    """The arms of a report, in a table and as numbers: overall, and where the problem is marked and is not."""
    rows, facts = [], {}
    for arm, outcomes in report.arms.items():
        for group in (*report.groups(), "unmarked"):
            inside = np.array([group in (None, problem.subgroup or "unmarked") for problem in report.problems])
            right, length = outcomes.correct[inside].mean(1), outcomes.length[inside].mean(1).astype(float)
            gain = right - report.arms[report.baseline].correct[inside].mean(1)
            longer = length - report.arms[report.baseline].length[inside].mean(1)
            cells = {
                "n": len(right), "accuracy": [right.mean(), *interval_of_mean(right)],
                "against plain": [gain.mean(), *interval_of_mean(gain)],
                "length": [length.mean(), *interval_of_mean(length)],
                "longer": [longer.mean(), *interval_of_mean(longer)],
                "truncated": float(outcomes.truncated[inside].mean()),
            }  # fmt: skip
            facts.setdefault(arm, {})[group or "all"] = {
                key: [round(float(x), 4) for x in value] if isinstance(value, list) else value
                for key, value in cells.items()
            }
            against = "" if arm == report.baseline else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*cells["against plain"])
            size = "{:.1f} [{:.1f}, {:.1f}]".format(*cells["length"])
            share = f"{cells['truncated']:.1%}"
            rows.append((arm, group or "all", len(right), f"{right.mean():.3f}", against, size, share))
    columns = ("arm", "problems", "n", "accuracy", "against plain [95 %]", "thinking tokens [95 %]", "truncated")
    Console(width=160).print(Table(columns, tuple(rows), title))
    return facts
