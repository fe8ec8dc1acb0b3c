"""CoT-Valve *(Ma et al. 2025)*: one weight delta as a dial of thinking length, and the data set it samples."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped
from transformers import PreTrainedModel

from probes.figures.plots import Dose, sweep_figure
from probes.files import staged_file
from probes.generation.completions import Completion, by_problem
from probes.generation.sampling import Sampling
from probes.late import go
from probes.tables import Shown, Table
from steer.deltas.delta import WeightDelta
from steer.deltas.dial import dialled
from steer.evaluation._evaluate import solve
from steer.evaluation.outcomes import Outcomes
from steer.evaluation.statistics import interval_of_mean
from steer.tasks.grading import is_correct
from steer.tasks.task import Problem, Task

STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
Polarity = Literal["longer", "shorter", "unclear"]


@dataclass(frozen=True, eq=False, repr=False)
class LengthDial(Shown):
    """The same problems solved at each strength, in rising order, with the same noise *(CoT-Valve, Ma et al. 2025)*.

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.deltas import open_delta
    >>> from steer.methods.cot_valve import length_dial
    >>> model, task = load("organism"), task_named("chains")
    >>> delta, problems = open_delta("organism-sft"), task.sample(6, "report")
    >>> sampling = Sampling.of(model, max_new_tokens=48)
    >>> dial = length_dial(model, delta, task, problems, sampling=sampling, strengths=(0, 1))
    >>> dial.monotone, dial.mixchain("mixchain.jsonl").rows
    (True, ((0, 3), (1, 3)))
    """

    task: Task
    problems: tuple[Problem, ...]
    completions: dict[float, tuple[Completion, ...]]

    @property
    def outcomes(self) -> dict[float, Outcomes]:
        return {strength: Outcomes.of(done, self.problems, self.task) for strength, done in self.completions.items()}

    @property
    def change(self) -> tuple[float, tuple[float, float]]:
        """Thinking tokens at the largest strength less those at the smallest, paired by problem; 95 % bootstrap."""
        outcomes = list(self.outcomes.values())
        per_problem = outcomes[-1].length.mean(axis=1) - outcomes[0].length.mean(axis=1)
        return float(per_problem.mean()), interval_of_mean(per_problem)

    @property
    def polarity(self) -> Polarity:
        """What a larger strength does to the length of thinking, as measured; unclear where the interval holds zero."""
        _, (low, high) = self.change
        return "longer" if low > 0 else "shorter" if high < 0 else "unclear"

    @property
    def monotone(self) -> bool:
        """Does mean length go one way from strength to strength?"""
        steps = np.diff([outcome.length.mean() for outcome in self.outcomes.values()])
        return bool((steps > 0).all() or (steps < 0).all())

    def table(self) -> Table:
        """Per strength, with 95 % bootstrap intervals over problems."""
        rows = [
            (strength, _with_interval(o.correct), _with_interval(o.length, 1), f"{o.truncated.mean():.1%}")
            for strength, o in self.outcomes.items()
        ]
        title = f"n={len(self.problems)}; a larger strength thinks {self.polarity}"
        return Table(("strength", "accuracy [95 %]", "thinking tokens [95 %]", "truncated"), tuple(rows), title)

    def figure(self) -> "go.Figure":
        """Length and accuracy against strength."""
        doses = [
            Dose(
                strength,
                float(o.length.mean()),
                interval_of_mean(o.length.mean(1)),
                float(o.correct.mean()),
                interval_of_mean(o.correct.mean(1)),
                float(o.truncated.mean()),
            )
            for strength, o in self.outcomes.items()
        ]
        return sweep_figure(doses, (), name="the delta, times strength")

    def mixchain(self, output: str | Path) -> Table:
        """Write the correct solutions, one line each: question, answer, solution, strength, length, beta.

        MixChain-Z, with beta = 1 - (m - m_min) / (m_max - m_min) over the solutions of a problem (CoT-Valve++): 1 for
        the shortest; 0 where there is but one length. What was truncated or wrong is left out.
        """
        lines = [line for problem in self.problems for line in self._solutions(problem)]
        with staged_file(Path(output)) as stage:
            stage.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        counts = [(strength, sum(line["strength"] == strength for line in lines)) for strength in self.completions]
        return Table(("strength", "solutions kept"), tuple(counts), str(output))

    def _solutions(self, problem: Problem) -> list[dict[str, Any]]:
        solutions = [
            (strength, completion)
            for strength, done in self.completions.items()
            for completion in by_problem(done)[problem.id]
            if is_correct(completion, problem, self.task.grader)
        ]
        lengths = [completion.thinking_tokens for _, completion in solutions]
        spread = max(lengths, default=0) - min(lengths, default=0)
        return [
            {
                "question": problem.question,
                "answer": problem.answer,
                "thinking": completion.thinking,
                "solution": completion.answer,
                "strength": strength,
                "thinking_tokens": length,
                "beta": 1 - (length - min(lengths)) / spread if spread else 0.0,
            }
            for (strength, completion), length in zip(solutions, lengths, strict=True)
        ]


def length_dial(
    model: PreTrainedModel,
    delta: WeightDelta,
    task: Task,
    problems: Sequence[Problem],
    *,
    sampling: Sampling,
    strengths: Sequence[float] = STRENGTHS,
    samples: int = 1,
    batch_size: int = 64,
) -> LengthDial:
    """Solve the problems at each strength, on one loaded model. Raises ValueError for fewer than two strengths.

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.deltas import open_delta
    >>> from steer.methods.cot_valve import length_dial
    >>> model, task = load("organism"), task_named("chains")
    >>> delta, problems = open_delta("organism-sft"), task.sample(6, "report")
    >>> sampling = Sampling.of(model, max_new_tokens=48)
    >>> dial = length_dial(model, delta, task, problems, sampling=sampling, strengths=(0, 1))
    >>> dial.change[0], dial.polarity
    (-2.0, 'unclear')
    """
    if len(set(strengths)) < 2:
        raise ValueError("A dial has at least two settings: give several strengths.")
    done = {}
    for strength in sorted(set(strengths)):
        with dialled(model, delta, strength):
            label = f"strength {strength:g}"
            done[strength] = tuple(
                solve(model, problems, sampling=sampling, samples=samples, batch_size=batch_size, label=label)
            )
    return LengthDial(task, tuple(problems), done)


def _with_interval(values: Shaped[np.ndarray, "problems samples"], digits: int = 3) -> str:
    low, high = interval_of_mean(values.mean(1))
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
