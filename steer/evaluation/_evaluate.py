"""Compare arms on one set of problems: accuracy, thinking length and truncation, paired, with intervals."""

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from transformers import PreTrainedModel

from probes.completions import Completion
from probes.generation import generate
from probes.models import fingerprint
from probes.sampling import Sampling
from probes.tables import Table
from steer.decoding.control import Control, Controlled
from steer.decoding.prompts import Ask
from steer.evaluation.outcomes import Outcomes
from steer.evaluation.statistics import adjusted, interval_of_mean, paired_p
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied
from steer.tasks.grading import is_correct
from steer.tasks.task import Grader, Problem, Task

Arm = None | Recipe | PreTrainedModel | Control | Ask | Sequence[Completion]
SHORTEST = (0.05, 0.10, 0.20)


@dataclass(frozen=True)
class Score:
    """One arm on one group of problems. `difference` is its accuracy less the plain model's, paired by problem.

    `p` is that of no difference (`steer.evaluation.statistics.paired_p`), `p_adjusted` the same over all arms of the
    group (Benjamini-Hochberg). `per_1000` is accuracy per 1,000 thinking tokens: the mean of one over the mean of the other.
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
    store: Path | None = None,
) -> Evaluation:
    """Run every arm on the same problems.

    None is the plain model; a recipe is applied at run time; a model is run; a control decides over tokens beside the
    model; an `Ask` puts the questions otherwise; completions made elsewhere are graded.

    All arms draw with the same noise per problem and sample, so that they are compared in pairs. With `store`, a
    folder, completions are kept there, a file for each arm, and what it holds is not generated again.
    """
    if store is not None:
        Path(store).mkdir(parents=True, exist_ok=True)
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
                    store=None if store is None else Path(store) / _file_of(name, subject, arm),
                    grader=task.grader,
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
    grader: Grader | None = None,
    label: str = "solving",
) -> list[Completion]:
    """Completions of the problems' questions, put as `ask` says, under a control; named by the problems' ids.

    `store`: see `probes.generation.generate`. With `grader` the progress bar shows the accuracy so far.
    """
    named = {problem.id: problem for problem in problems}
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
        judge=None if grader is None else lambda c: is_correct(c, named[c.id], grader),
        label=label,
    )


def _file_of(name: str, subject: PreTrainedModel, arm: Arm) -> str:
    """The arm's name in a store, with a checksum of all that the completions' own words do not tell."""
    own = arm.fingerprint() if isinstance(arm, Recipe) else str(arm) if isinstance(arm, Control | Ask) else ""
    words = f"{name} {fingerprint(subject)} {own}"
    return f"{re.sub('[^-+.0-9A-Za-z]+', '_', name)[:60]}-{sha256(words.encode()).hexdigest()[:8]}.jsonl"


def _strict(numbers: Sequence[float]) -> list[float | None]:
    """JSON has no NaN: what cannot be told is null."""
    return [None if np.isnan(x) else x for x in numbers]
