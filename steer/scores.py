"""Compare arms on one set of problems: accuracy, thinking length and truncation, paired, with intervals."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import bootstrap
from transformers import PreTrainedModel

from probes.completions import Completion, by_problem
from probes.generation import generate
from probes.sampling import Sampling
from probes.tables import Table
from steer.application import applied
from steer.controls import Control, Controlled
from steer.grading import is_correct
from steer.prompts import Ask
from steer.recipes import Recipe
from steer.tasks import Problem, Task

Arm = None | Recipe | PreTrainedModel | Control | Ask | Sequence[Completion]
SHORTEST = (0.05, 0.10, 0.20)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What one arm did: a row a problem, a column a sample."""

    correct: Bool[np.ndarray, "problems samples"]
    length: Int[np.ndarray, "problems samples"]
    truncated: Bool[np.ndarray, "problems samples"]

    @classmethod
    def of(cls, completions: Sequence[Completion], problems: Sequence[Problem], task: Task) -> "Outcomes":
        groups = by_problem(completions)
        rows = [groups[problem.id] for problem in problems]
        right = [[is_correct(c, p, task.grader) for c in row] for p, row in zip(problems, rows, strict=True)]
        return cls(
            np.array(right),
            np.array([[c.thinking_tokens for c in row] for row in rows]),
            np.array([[c.truncated for c in row] for row in rows]),
        )

    @classmethod
    def pooled(cls, draws: Sequence["Outcomes"]) -> "Outcomes":
        """Several draws of one control, as samples of one arm."""
        return cls(
            *(np.concatenate([getattr(d, f) for d in draws], axis=1) for f in ("correct", "length", "truncated"))
        )

    def only(self, rows: Bool[np.ndarray, " problems"]) -> "Outcomes":
        return Outcomes(self.correct[rows], self.length[rows], self.truncated[rows])

    def shortest(self, share: float) -> tuple[float, float]:
        """Accuracy and length of the floor(share * n) shortest completions of a run, averaged over runs (ThinkEdit).

        A run is one sample of every problem. NaN where the share is no whole completion.
        """
        count = int(share * len(self.length))
        if count == 0:
            return float("nan"), float("nan")
        order = np.argsort(self.length, axis=0, kind="stable")[:count]
        pick = (np.take_along_axis(values, order, axis=0).mean() for values in (self.correct, self.length))
        accuracy, length = pick
        return float(accuracy), float(length)


@dataclass(frozen=True)
class Score:
    """One arm on one group of problems. `difference` is its accuracy less the plain model's, paired by problem."""

    n: int
    samples: int
    accuracy: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    length: float
    truncation: float
    shortest: dict[str, tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "samples": self.samples,
            "accuracy": self.accuracy,
            "interval": _strict(self.interval),
            "difference": self.difference,
            "difference_interval": _strict(self.difference_interval),
            "length": self.length,
            "truncation": self.truncation,
            "shortest": {share: _strict(pair) for share, pair in self.shortest.items()},
        }


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All arms on one set of problems. The arm `plain` is what the others are compared with."""

    task: Task
    problems: tuple[Problem, ...]
    arms: dict[str, Outcomes]

    def score(self, arm: str, subgroup: str | None = None) -> Score:
        """The arm overall, or on the problems of a subgroup."""
        rows = np.array([subgroup is None or problem.subgroup == subgroup for problem in self.problems])
        if not rows.any():
            raise ValueError(f"No problem of {self.task.name} is in the subgroup {subgroup!r}.")
        own, plain = self.arms[arm].only(rows), self.arms["plain"].only(rows)
        accuracy = own.correct.mean(1)
        difference = accuracy - plain.correct.mean(1)
        return Score(
            n=len(accuracy),
            samples=own.correct.shape[1],
            accuracy=float(accuracy.mean()),
            interval=interval_of_mean(accuracy),
            difference=float(difference.mean()),
            difference_interval=interval_of_mean(difference),
            length=float(own.length.mean()),
            truncation=float(own.truncated.mean()),
            shortest={f"{share:.0%}": own.shortest(share) for share in SHORTEST},
        )

    def groups(self) -> list[str | None]:
        present = {problem.subgroup for problem in self.problems}
        return [None, *([self.task.subgroup] if self.task.subgroup in present - {None} else [])]

    def table(self) -> Table:
        rows = []
        for arm in self.arms:
            for group in self.groups():
                s = self.score(arm, group)
                low, high = s.difference_interval
                gain = "" if arm == "plain" else f"{s.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
                short = " / ".join(f"{accuracy:.2f}" for accuracy, _ in s.shortest.values())
                cells = (f"{s.accuracy:.3f}", gain, f"{s.length:.1f}", short, f"{s.truncation:.1%}")
                rows.append((arm, group or "all", s.n, s.samples, *cells))
        columns = ("arm", "problems", "n", "samples", "accuracy", "against plain [95 %]", "thinking tokens",
                   "shortest 5/10/20 %", "truncated")  # fmt: skip
        return Table(columns, tuple(rows), self.task.name)

    def to_frame(self):
        return self.table().to_frame()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def to_json(self) -> dict[str, Any]:
        """Per arm its overall score, and under the subgroup's name the subgroup's."""
        return {
            arm: self.score(arm).to_json() | {g: self.score(arm, g).to_json() for g in self.groups() if g}
            for arm in self.arms
        }


def evaluate(
    model: PreTrainedModel,
    task: Task,
    problems: Sequence[Problem],
    arms: Mapping[str, Arm],
    *,
    sampling: Sampling,
    samples: int = 1,
    batch_size: int = 64,
) -> Evaluation:
    """Run every arm on the same problems.

    None is the plain model; a recipe is applied at run time; a model is run; a control decides over tokens beside the
    model; an `Ask` puts the questions otherwise; completions made elsewhere are graded.

    All arms draw with the same noise per problem and sample, so that they are compared in pairs.
    """
    outcomes = {}
    for name, arm in {"plain": None, **arms}.items():
        if arm is None or isinstance(arm, Recipe | PreTrainedModel | Control | Ask):
            subject = arm if isinstance(arm, PreTrainedModel) else model
            with applied(model, arm, must_fire=False) if isinstance(arm, Recipe) else nullcontext():
                completions: Sequence[Completion] = solve(
                    subject,
                    problems,
                    sampling=sampling,
                    samples=samples,
                    batch_size=batch_size,
                    control=arm if isinstance(arm, Control) else None,
                    ask=arm if isinstance(arm, Ask) else Ask(),
                    label=name,
                )
        else:
            completions = arm
        outcomes[name] = Outcomes.of(completions, problems, task)
    return Evaluation(task, tuple(problems), outcomes)


def solve(
    model: PreTrainedModel,
    problems: Sequence[Problem],
    *,
    sampling: Sampling,
    samples: int = 1,
    batch_size: int = 64,
    control: Control | None = None,
    ask: Ask = Ask(),  # noqa: B008
    store: Path | None = None,
    label: str = "solving",
) -> list[Completion]:
    """Completions of the problems' questions, put as `ask` says, under a control; named by the problems' ids."""
    questions, ids = [ask.question(problem.question) for problem in problems], [problem.id for problem in problems]
    return generate(
        model,
        questions,
        ids=ids,
        sampling=sampling,
        samples=samples,
        batch_size=batch_size,
        template=ask.template,
        prefill=ask.prefill(model),
        decoding=None if control is None else Controlled(model, control),
        store=store,
        label=label,
    )


def interval_of_mean(per_problem: Float[np.ndarray, " problems"]) -> tuple[float, float]:
    """95 % percentile bootstrap over problems, 2,000 resamples, seed 0."""
    if len(per_problem) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(0)
    result = bootstrap((per_problem,), np.mean, n_resamples=2_000, method="percentile", rng=rng)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _strict(numbers: Sequence[float]) -> list[float | None]:
    """JSON has no NaN: what cannot be told is null."""
    return [None if np.isnan(x) else x for x in numbers]
