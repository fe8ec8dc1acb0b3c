"""What arms did on one set of problems: accuracy, thinking length and truncation, paired, with intervals."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Bool

from probes.fields import plain_fields
from probes.tables import Shown, Table
from steer.evaluation.outcomes import Outcomes
from steer.evaluation.statistics import adjusted, interval_of_mean, paired_p
from steer.tasks.task import Problem, Task

SHORTEST = (0.05, 0.10, 0.20)


@dataclass(frozen=True)
class Score:
    """One arm on one group of problems. `difference` is its accuracy less the plain model's, paired by problem.

    Lengths are in thinking tokens, the rest are shares between 0 and 1; intervals are 95 %.
    `p` is that of no difference (`steer.evaluation.statistics.paired_p`), `p_adjusted` the same over all arms of the
    group (Benjamini-Hochberg). `per_1000` is accuracy per 1,000 thinking tokens: the mean of one over the mean of
    the other. `repeated` is the mean `repetition` of the thinking. NaN for what cannot be told.

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.evaluation import evaluate
    >>> model, task = load("organism"), task_named("chains")
    >>> sampling = Sampling.of(model, max_new_tokens=48)
    >>> score = evaluate(model, task, task.sample(8, "report"), {}, sampling=sampling).score("plain")
    >>> score.n, score.accuracy, score.interval
    (8, 0.5, (0.125, 0.875))
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

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them: what cannot be told is null."""
        return plain_fields(self)


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Shown):
    """All arms on one set of problems. `baseline` names the arm that the others are compared with.

    Every comparison is paired by problem. Mean over samples first, then over problems.

    >>> from probes import Sampling, load
    >>> from steer import evaluate, task_named
    >>> from steer.decoding import Budget
    >>> model, task = load("organism"), task_named("chains")
    >>> sampling = Sampling.of(model, max_new_tokens=48)
    >>> evaluation = evaluate(model, task, task.sample(8, "report"), {"budget": Budget(4)}, sampling=sampling)
    >>> evaluation.score("budget").length, evaluation.better()
    (5.125, [])
    """

    task: Task
    problems: tuple[Problem, ...]
    arms: Mapping[str, Outcomes]
    baseline: str = "plain"

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", MappingProxyType(dict(self.arms)))

    def joined(self, other: "Evaluation") -> "Evaluation":
        """These arms and the other's, on the same problems; where both have an arm, the other's is taken.

        Raises ValueError where the problems differ.
        """
        if self.problems != other.problems:
            raise ValueError("Two evaluations are joined only on the same problems, in the same order.")
        return replace(self, arms={**self.arms, **other.arms})

    def score(self, arm: str, subgroup: str | None = None) -> Score:
        """The arm overall, or on the problems of a subgroup."""
        rows = self._rows(subgroup)
        outcomes, plain = self.arms[arm].only(rows), self.arms[self.baseline].only(rows)
        accuracy = outcomes.correct.mean(1)
        difference = accuracy - plain.correct.mean(1)
        length, p_values = float(outcomes.length.mean()), self.p_values(subgroup)
        return Score(
            n=len(accuracy),
            samples=outcomes.correct.shape[1],
            accuracy=float(accuracy.mean()),
            interval=interval_of_mean(accuracy),
            difference=float(difference.mean()),
            difference_interval=interval_of_mean(difference),
            p=p_values.get(arm, float("nan")),
            p_adjusted=adjusted(p_values).get(arm, float("nan")),
            length=length,
            per_1000=1000 * float(accuracy.mean()) / length if length else float("nan"),
            truncation=float(outcomes.truncated.mean()),
            repeated=float("nan") if outcomes.repeated is None else float(outcomes.repeated.mean()),
            shortest={f"{share:.0%}": outcomes.shortest(share) for share in SHORTEST},
        )

    def p_values(self, subgroup: str | None = None) -> dict[str, float]:
        """Of each arm but the plain one, the p of no difference from it, not adjusted."""
        rows = self._rows(subgroup)
        plain = self.arms[self.baseline].correct[rows]
        return {arm: paired_p(o.correct[rows], plain) for arm, o in self.arms.items() if arm != self.baseline}

    def better(self, *, level: float = 0.05, subgroup: str | None = None) -> list[str]:
        """Arms that are right more often than the plain model, at an adjusted p below `level`. Best first."""
        rows, p_adjusted = self._rows(subgroup), adjusted(self.p_values(subgroup))
        accuracy = {arm: float(o.correct[rows].mean()) for arm, o in self.arms.items()}
        arms = [arm for arm, p in p_adjusted.items() if p < level and accuracy[arm] > accuracy[self.baseline]]
        return sorted(arms, key=lambda arm: -accuracy[arm])

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
                gain = "" if arm == self.baseline else f"{s.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
                short = " / ".join(f"{accuracy:.2f}" for accuracy, _ in s.shortest.values())
                p = "" if arm == self.baseline else f"{s.p_adjusted:.2g}"
                repeated = "" if np.isnan(s.repeated) else f"{s.repeated:.1%}"
                efficiency = "" if np.isnan(s.per_1000) else f"{s.per_1000:.3g}"
                size = (f"{s.length:.1f}", efficiency, short, f"{s.truncation:.1%}", repeated)
                cells = (f"{s.accuracy:.3f}", gain, p, *size)
                rows.append((arm, group or "all", s.n, s.samples, *cells))
        columns = ("arm", "problems", "n", "samples", "accuracy", f"against {self.baseline} [95 %]", "p (adjusted)",
                   "thinking tokens", "accuracy per 1,000", "shortest 5/10/20 %", "truncated",
                   "repeated 4-grams")  # fmt: skip
        stopped = sum(int(arm.ungraded.sum()) for arm in self.arms.values() if arm.ungraded is not None)
        note = f"; grading stopped, and wrong: {stopped}" if stopped else ""
        return Table(columns, tuple(rows), self.task.name + note)

    def to_dict(self) -> dict[str, Any]:
        """Per arm its overall score, and under the subgroup's name the subgroup's."""
        return {
            arm: self.score(arm).to_dict() | {g: self.score(arm, g).to_dict() for g in self.groups() if g}
            for arm in self.arms
        }
