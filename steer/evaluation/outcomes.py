"""What an arm did: for each problem and sample, whether it was right, how long it thought, and what was cut off."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from probes.generation.completions import Completion, by_problem
from probes.tables import Brief
from steer.tasks.grading import grade
from steer.tasks.task import Problem, Task


@dataclass(frozen=True, eq=False, repr=False)
class Outcomes(Brief):
    """What one arm did: a row a problem, a column a sample. `length` is in thinking tokens.

    `repeated`: see `repetition`; `ungraded`: grading was stopped, and they count as wrong; None where not known.

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.evaluation import Outcomes, solve
    >>> model, task = load("organism"), task_named("chains")
    >>> sampling = Sampling.of(model, max_new_tokens=48)
    >>> problems = task.sample(4, "report")
    >>> outcomes = Outcomes.of(solve(model, problems, sampling=sampling, samples=2), problems, task)
    >>> outcomes.correct.shape, outcomes.length.tolist()
    ((4, 2), [[20, 20], [26, 5], [8, 14], [3, 5]])
    """

    correct: Bool[np.ndarray, "problems samples"]
    length: Int[np.ndarray, "problems samples"]
    truncated: Bool[np.ndarray, "problems samples"]
    repeated: Float[np.ndarray, "problems samples"] | None = None
    ungraded: Bool[np.ndarray, "problems samples"] | None = None

    @classmethod
    def of(cls, completions: Sequence[Completion], problems: Sequence[Problem], task: Task) -> "Outcomes":
        groups = by_problem(completions)
        rows = [groups[problem.id] for problem in problems]
        grades = [[grade(c, p, task.grader) for c in row] for p, row in zip(problems, rows, strict=True)]
        return cls(
            np.array([[g.correct for g in row] for row in grades]),
            np.array([[c.thinking_tokens for c in row] for row in rows]),
            np.array([[c.truncated for c in row] for row in rows]),
            np.array([[_repetition_of(c) for c in row] for row in rows]),
            np.array([[g.stopped for g in row] for row in grades]),
        )

    @classmethod
    def pooled(cls, draws: Sequence["Outcomes"]) -> "Outcomes":
        """Several draws of one null, as samples of one arm."""
        repeated, ungraded = (
            [x for x in all_of if x is not None]
            for all_of in zip(*[(d.repeated, d.ungraded) for d in draws], strict=True)
        )
        return cls(
            np.concatenate([d.correct for d in draws], axis=1),
            np.concatenate([d.length for d in draws], axis=1),
            np.concatenate([d.truncated for d in draws], axis=1),
            np.concatenate(repeated, axis=1) if len(repeated) == len(draws) else None,
            np.concatenate(ungraded, axis=1) if len(ungraded) == len(draws) else None,
        )

    def only(self, rows: Bool[np.ndarray, " problems"]) -> "Outcomes":
        repeated, ungraded = (None if x is None else x[rows] for x in (self.repeated, self.ungraded))
        return Outcomes(self.correct[rows], self.length[rows], self.truncated[rows], repeated, ungraded)

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


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """The share of the n-grams of tokens that have come before: 1 - different ones / all. 0 where there are none.

    >>> from steer.evaluation import repetition
    >>> repetition([1, 2, 3, 1, 2, 3], n=2), repetition([1, 2, 3, 4])
    (0.4, 0.0)
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _repetition_of(completion: Completion) -> float:
    """Of the thinking, its delimiters included where the model wrote them."""
    span = completion.span
    return 0.0 if span is None else repetition(completion.all_ids[span.start : span.end])
