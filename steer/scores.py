"""Compare arms on one set of problems: accuracy, thinking length and truncation, paired, with intervals."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
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
from steer.statistics import adjusted, interval_of_mean, paired_p
from steer.tasks import Problem, Task

Arm = None | Recipe | PreTrainedModel | Control | Ask | Sequence[Completion]
SHORTEST = (0.05, 0.10, 0.20)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What one arm did: a row a problem, a column a sample. `repeated`: see `repetition`; None where not known."""

    correct: Bool[np.ndarray, "problems samples"]
    length: Int[np.ndarray, "problems samples"]
    truncated: Bool[np.ndarray, "problems samples"]
    repeated: Float[np.ndarray, "problems samples"] | None = None

    @classmethod
    def of(cls, completions: Sequence[Completion], problems: Sequence[Problem], task: Task) -> "Outcomes":
        groups = by_problem(completions)
        rows = [groups[problem.id] for problem in problems]
        right = [[is_correct(c, p, task.grader) for c in row] for p, row in zip(problems, rows, strict=True)]
        return cls(
            np.array(right),
            np.array([[c.thinking_tokens for c in row] for row in rows]),
            np.array([[c.truncated for c in row] for row in rows]),
            np.array([[_repetition_of(c) for c in row] for row in rows]),
        )

    @classmethod
    def pooled(cls, draws: Sequence["Outcomes"]) -> "Outcomes":
        """Several draws of one control, as samples of one arm."""
        repeated = [d.repeated for d in draws if d.repeated is not None]
        return cls(
            np.concatenate([d.correct for d in draws], axis=1),
            np.concatenate([d.length for d in draws], axis=1),
            np.concatenate([d.truncated for d in draws], axis=1),
            np.concatenate(repeated, axis=1) if len(repeated) == len(draws) else None,
        )

    def only(self, rows: Bool[np.ndarray, " problems"]) -> "Outcomes":
        repeated = None if self.repeated is None else self.repeated[rows]
        return Outcomes(self.correct[rows], self.length[rows], self.truncated[rows], repeated)

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
    """One arm on one group of problems. `difference` is its accuracy less the plain model's, paired by problem.

    `p` is that of no difference (`steer.statistics.paired_p`), `p_adjusted` the same over all arms of the group
    (Benjamini-Hochberg). `per_1000` is accuracy per 1,000 thinking tokens: the mean of one over the mean of the other.
    `repeated` is the mean `repetition` of the thinking. NaN for what cannot be told.
    """

    n: int
    samples: int
    accuracy: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    p: float
    p_adjusted: float
    length: float
    per_1000: float
    truncation: float
    repeated: float
    shortest: dict[str, tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "samples": self.samples,
            "accuracy": self.accuracy,
            "interval": _strict(self.interval),
            "difference": self.difference,
            "difference_interval": _strict(self.difference_interval),
            **dict(zip(("p", "p_adjusted"), _strict((self.p, self.p_adjusted)), strict=True)),
            "length": self.length,
            "truncation": self.truncation,
            **dict(zip(("per_1000", "repeated"), _strict((self.per_1000, self.repeated)), strict=True)),
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
        rows = self._rows(subgroup)
        own, plain = self.arms[arm].only(rows), self.arms["plain"].only(rows)
        accuracy = own.correct.mean(1)
        difference = accuracy - plain.correct.mean(1)
        length, p_values = float(own.length.mean()), self.p_values(subgroup)
        return Score(
            n=len(accuracy),
            samples=own.correct.shape[1],
            accuracy=float(accuracy.mean()),
            interval=interval_of_mean(accuracy),
            difference=float(difference.mean()),
            difference_interval=interval_of_mean(difference),
            p=p_values.get(arm, float("nan")),
            p_adjusted=adjusted(p_values).get(arm, float("nan")),
            length=length,
            per_1000=1000 * float(accuracy.mean()) / length if length else float("nan"),
            truncation=float(own.truncated.mean()),
            repeated=float("nan") if own.repeated is None else float(own.repeated.mean()),
            shortest={f"{share:.0%}": own.shortest(share) for share in SHORTEST},
        )

    def p_values(self, subgroup: str | None = None) -> dict[str, float]:
        """Of each arm but the plain one, the p of no difference from it, not adjusted."""
        rows = self._rows(subgroup)
        plain = self.arms["plain"].correct[rows]
        return {arm: paired_p(o.correct[rows], plain) for arm, o in self.arms.items() if arm != "plain"}

    def better(self, *, level: float = 0.05, subgroup: str | None = None) -> list[str]:
        """Arms that are right more often than the plain model, at an adjusted p below `level`. Best first."""
        rows, p_adjusted = self._rows(subgroup), adjusted(self.p_values(subgroup))
        accuracy = {arm: float(o.correct[rows].mean()) for arm, o in self.arms.items()}
        found = [arm for arm, p in p_adjusted.items() if p < level and accuracy[arm] > accuracy["plain"]]
        return sorted(found, key=lambda arm: -accuracy[arm])

    def _rows(self, subgroup: str | None) -> Bool[np.ndarray, " problems"]:
        rows = np.array([subgroup is None or problem.subgroup == subgroup for problem in self.problems])
        if not rows.any():
            raise ValueError(f"No problem of {self.task.name} is in the subgroup {subgroup!r}.")
        return rows

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
                p = "" if arm == "plain" else f"{s.p_adjusted:.2g}"
                repeated = "" if np.isnan(s.repeated) else f"{s.repeated:.1%}"
                efficiency = "" if np.isnan(s.per_1000) else f"{s.per_1000:.3g}"
                size = (f"{s.length:.1f}", efficiency, short, f"{s.truncation:.1%}", repeated)
                cells = (f"{s.accuracy:.3f}", gain, p, *size)
                rows.append((arm, group or "all", s.n, s.samples, *cells))
        columns = ("arm", "problems", "n", "samples", "accuracy", "against plain [95 %]", "p (adjusted)",
                   "thinking tokens", "accuracy per 1,000", "shortest 5/10/20 %", "truncated",
                   "repeated 4-grams")  # fmt: skip
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


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """The share of the n-grams of tokens that have come before: 1 - different ones / all. 0 where there are none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _repetition_of(completion: Completion) -> float:
    """Of the thinking, its delimiters included where the model wrote them."""
    span = completion.span
    return 0.0 if span is None else repetition(completion.all_ids[span.start : span.end])


def _strict(numbers: Sequence[float]) -> list[float | None]:
    """JSON has no NaN: what cannot be told is null."""
    return [None if np.isnan(x) else x for x in numbers]
