"""What arms did on a task of the harness: its metrics document by document, and the numbers that it makes of them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from probes.late import stats
from probes.tables import Shown, Table
from steer.evaluation.statistics import adjusted, interval_of_mean, paired_p


@dataclass(frozen=True, order=True)
class Metric:
    """A metric of one task, behind one of its filters.

    >>> from steer.harness import Metric
    >>> str(Metric("gsm8k", "exact_match", "strict-match"))
    'gsm8k exact_match (strict-match)'
    """

    task: str
    name: str
    filter: str = "none"

    def __str__(self) -> str:
        return f"{self.task} {self.name}" + ("" if self.filter == "none" else f" ({self.filter})")


@dataclass(frozen=True, eq=False)
class Scores:
    """Of one arm: a metric's value for each document, in their order, and what the harness makes of them (`told`).

    >>> import numpy as np
    >>> from steer.harness import Scores
    >>> Scores(np.array([1.0, 0.0]), told=0.5).is_mean
    True
    """

    values: Float[np.ndarray, " docs"]
    told: float

    @property
    def is_mean(self) -> bool:
        """Is the harness' number the mean over documents, so that arms can be compared document by document?"""
        return bool(len(self.values)) and bool(np.isclose(self.values.mean(), self.told, rtol=0, atol=1e-9))


@dataclass(frozen=True, eq=False, repr=False)
class HarnessEvaluation(Shown):
    """All arms on the same documents. `baseline` is the arm that the others are compared with.

    >>> import numpy as np
    >>> from steer.harness import HarnessEvaluation, Metric, Scores
    >>> right, half = np.ones(8), np.array([1.0, 0.0] * 4)
    >>> arms = {"plain": {Metric("t", "acc"): Scores(half, 0.5)}, "steered": {Metric("t", "acc"): Scores(right, 1.0)}}
    >>> found = HarnessEvaluation(arms)
    >>> found.difference("steered", Metric("t", "acc"))
    (0.5, (0.125, 0.875))
    >>> found.p_values(Metric("t", "acc"))
    {'steered': 0.125}
    """

    arms: Mapping[str, Mapping[Metric, Scores]]
    baseline: str = "plain"

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """Those of the task, in its order."""
        return tuple(self.arms[self.baseline])

    def difference(self, arm: str, metric: Metric) -> tuple[float, tuple[float, float]]:
        """The mean of the arm less the baseline's, with its 95 % interval, by documents. NaN where it is no mean."""
        if not self._in_pairs(arm, metric):
            return float("nan"), (float("nan"), float("nan"))
        own = self._difference(arm, metric)
        return float(own.mean()), interval_of_mean(own)

    def p_values(self, metric: Metric) -> dict[str, float]:
        """By arm, that it is as good as the baseline: McNemar's exact test where a document is right or wrong, else
        Wilcoxon's signed-rank test."""
        names = [name for name in self.arms if name != self.baseline and self._in_pairs(name, metric)]
        return {name: self._p(name, metric) for name in names}

    def table(self) -> Table:
        """A row for each metric and arm."""
        rows = [row for metric in self.metrics for row in self._rows(metric)]
        columns = ("metric", "arm", "documents", "the harness says", "difference", "95 %", "p", "p adjusted")
        return Table(columns, tuple(rows), "lm-eval")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; what cannot be told is null."""
        rows = [dict(zip(self.table().columns, row, strict=True)) for row in self.table().rows]
        plain: dict[str, Any] = json.loads(json.dumps({"baseline": self.baseline, "rows": rows}, default=str))
        return plain

    def _rows(self, metric: Metric) -> Iterator[tuple[Any, ...]]:
        p_values = self.p_values(metric)
        fair = adjusted(p_values)
        for name, own in self.arms.items():
            difference, interval = self.difference(name, metric)
            compared = name in p_values
            words = f"[{interval[0]:.3f}, {interval[1]:.3f}]" if compared else ""
            yield (
                str(metric), name, len(own[metric].values), own[metric].told, difference if compared else "", words,
                p_values.get(name, ""), fair.get(name, ""),
            )  # fmt: skip

    def _in_pairs(self, arm: str, metric: Metric) -> bool:
        return self.arms[arm][metric].is_mean and self.arms[self.baseline][metric].is_mean

    def _difference(self, arm: str, metric: Metric) -> Float[np.ndarray, " docs"]:
        own: Float[np.ndarray, " docs"] = self.arms[arm][metric].values - self.arms[self.baseline][metric].values
        return own

    def _p(self, arm: str, metric: Metric) -> float:
        own, plain = (self.arms[name][metric].values for name in (arm, self.baseline))
        if np.isin(own, (0, 1)).all() and np.isin(plain, (0, 1)).all():
            return paired_p(own[:, None] == 1, plain[:, None] == 1)
        return float(stats.wilcoxon(own - plain).pvalue) if (own != plain).any() else 1.0
