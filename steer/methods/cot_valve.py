"""CoT-Valve *(Ma et al. 2025)*: one weight delta as a dial of thinking length, and the data set it samples."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped
from plotly.graph_objects import Figure
from transformers import PreTrainedModel

from probes.figures.plots import Dose, sweep_figure
from probes.files import staged_file
from probes.generation.completions import Completion, by_problem
from probes.generation.sampling import Sampling
from probes.tables import Table
from steer.deltas.delta import WeightDelta
from steer.deltas.dial import dialled
from steer.evaluation._evaluate import solve
from steer.evaluation.outcomes import Outcomes
from steer.evaluation.statistics import interval_of_mean
from steer.tasks.grading import is_correct
from steer.tasks.task import Problem, Task

ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
Polarity = Literal["longer", "shorter", "unclear"]


@dataclass(frozen=True, eq=False)
class Valve:
    """The same problems solved at each alpha, in rising order, with the same noise."""

    task: Task
    problems: tuple[Problem, ...]
    completions: dict[float, tuple[Completion, ...]]

    @property
    def outcomes(self) -> dict[float, Outcomes]:
        return {alpha: Outcomes.of(done, self.problems, self.task) for alpha, done in self.completions.items()}

    @property
    def change(self) -> tuple[float, tuple[float, float]]:
        """Thinking tokens at the largest alpha less those at the smallest, paired by problem; 95 % bootstrap."""
        outcomes = list(self.outcomes.values())
        per_problem = outcomes[-1].length.mean(axis=1) - outcomes[0].length.mean(axis=1)
        return float(per_problem.mean()), interval_of_mean(per_problem)

    @property
    def polarity(self) -> Polarity:
        """What a larger alpha does to the length of thinking, as measured; unclear where the interval holds zero."""
        _, (low, high) = self.change
        return "longer" if low > 0 else "shorter" if high < 0 else "unclear"

    @property
    def monotone(self) -> bool:
        """Does mean length go one way from alpha to alpha?"""
        steps = np.diff([outcome.length.mean() for outcome in self.outcomes.values()])
        return bool((steps > 0).all() or (steps < 0).all())

    def table(self) -> Table:
        """Per alpha, with 95 % bootstrap intervals over problems."""
        rows = [
            (alpha, _with_interval(o.correct), _with_interval(o.length, 1), f"{o.truncated.mean():.1%}")
            for alpha, o in self.outcomes.items()
        ]
        title = f"n={len(self.problems)}; a larger alpha thinks {self.polarity}"
        return Table(("alpha", "accuracy [95 %]", "thinking tokens [95 %]", "truncated"), tuple(rows), title)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def figure(self) -> Figure:
        """Length and accuracy against alpha."""
        doses = [
            Dose(
                alpha,
                float(o.length.mean()),
                interval_of_mean(o.length.mean(1)),
                float(o.correct.mean()),
                interval_of_mean(o.correct.mean(1)),
                float(o.truncated.mean()),
            )
            for alpha, o in self.outcomes.items()
        ]
        return sweep_figure(doses, (), name="the delta, times alpha")

    def mixchain(self, output: str | Path) -> Table:
        """Write the correct solutions, one line each: question, answer, solution, alpha, length, beta.

        MixChain-Z, with beta = 1 - (m - m_min) / (m_max - m_min) over the solutions of a problem (CoT-Valve++): 1 for
        the shortest; 0 where there is but one length. What was truncated or wrong is left out.
        """
        lines = [line for problem in self.problems for line in self._solutions(problem)]
        with staged_file(Path(output)) as stage:
            stage.write_text("".join(json.dumps(line) + "\n" for line in lines))
        counts = [(alpha, sum(line["alpha"] == alpha for line in lines)) for alpha in self.completions]
        return Table(("alpha", "solutions kept"), tuple(counts), str(output))

    def _solutions(self, problem: Problem) -> list[dict[str, Any]]:
        kept = [
            (alpha, completion)
            for alpha, done in self.completions.items()
            for completion in by_problem(done)[problem.id]
            if is_correct(completion, problem, self.task.grader)
        ]
        lengths = [completion.thinking_tokens for _, completion in kept]
        spread = max(lengths, default=0) - min(lengths, default=0)
        return [
            {
                "question": problem.question,
                "answer": problem.answer,
                "thinking": completion.thinking,
                "solution": completion.answer,
                "alpha": alpha,
                "thinking_tokens": length,
                "beta": 1 - (length - min(lengths)) / spread if spread else 0.0,
            }
            for (alpha, completion), length in zip(kept, lengths, strict=True)
        ]


def valve(
    model: PreTrainedModel,
    delta: WeightDelta,
    task: Task,
    problems: Sequence[Problem],
    *,
    sampling: Sampling,
    alphas: Sequence[float] = ALPHAS,
    samples: int = 1,
    batch_size: int = 64,
) -> Valve:
    """Solve the problems at each alpha, on one loaded model. Raises ValueError for fewer than two alphas."""
    if len(set(alphas)) < 2:
        raise ValueError("A dial has at least two settings: give several alphas.")
    done = {}
    for alpha in sorted(set(alphas)):
        with dialled(model, delta, alpha):
            label = f"alpha {alpha:g}"
            done[alpha] = tuple(
                solve(model, problems, sampling=sampling, samples=samples, batch_size=batch_size, label=label)
            )
    return Valve(task, tuple(problems), done)


def _with_interval(values: Shaped[np.ndarray, "problems samples"], digits: int = 3) -> str:
    low, high = interval_of_mean(values.mean(1))
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
