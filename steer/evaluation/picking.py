"""Rules that choose among samples, side by side: how often they are right, and at what cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from probes.evidence.signals import SignalTable, signal_table
from probes.generation.completions import Completion
from probes.tables import Shown, Table
from steer.decoding.selection import (
    Pick,
    Samples,
    accept_early,
    acceptance_threshold,
    best_of,
    chances,
    cross_validated,
    majority,
)
from steer.evaluation.statistics import interval_of_mean
from steer.tasks.grading import is_correct
from steer.tasks.task import Problem, Task

Interval = tuple[float, float]


@dataclass(frozen=True)
class PickScore:
    """A rule on `n` problems: samples drawn and tokens generated a problem, accuracy, and what majority vote has over
    all samples and over as many tokens (between two numbers of samples, as far as it is; with fewer tokens than one
    sample takes, one sample), as differences paired by problem. Intervals are 95 %.

    >>> from steer.evaluation import PickScore
    >>> PickScore("best", 90, 8.0, 900.0, 0.7, (0.6, 0.8), 0.1, (0.0, 0.2), 0.1, (0.0, 0.2)).accuracy
    0.7
    """

    name: str
    n: int
    drawn: float
    tokens: float
    accuracy: float
    interval: Interval
    over_majority: float
    over_majority_interval: Interval
    at_equal_tokens: float
    at_equal_tokens_interval: Interval


@dataclass(frozen=True, eq=False, repr=False)
class PickTable(Shown):
    """Rules on the same samples.

    >>> import numpy as np
    >>> from steer.decoding import Samples, majority
    >>> from steer.evaluation import pick_table
    >>> samples = Samples(np.array([[0, 1], [0, 0]]), np.array([[True, False]] * 2), np.array([[5, 6], [5, 5]]), {})
    >>> pick_table(samples, {"vote": majority(samples)})["vote"].accuracy
    1.0
    """

    samples: int
    scores: tuple[PickScore, ...]

    def __getitem__(self, name: str) -> PickScore:
        """The score of a rule. Raises KeyError, with those that are known."""
        for score in self.scores:
            if score.name == name:
                return score
        raise KeyError(f"{name!r} is none of these rules. Known: {', '.join(score.name for score in self.scores)}.")

    def table(self) -> Table:
        """A row for each rule."""

        def said(value: float, interval: Interval) -> str:
            return f"{value:+.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}]"

        rows = [
            (s.name, s.n, round(s.drawn, 2), round(s.tokens, 1), s.accuracy,
             said(s.over_majority, s.over_majority_interval), said(s.at_equal_tokens, s.at_equal_tokens_interval))
            for s in self.scores
        ]  # fmt: skip
        columns = ("rule", "problems", "samples", "tokens", "accuracy", f"against majority of {self.samples} [95 %]",
                   "against majority at equal tokens [95 %]")  # fmt: skip
        return Table(columns, tuple(rows), "Which sample to trust")


def pick_table(samples: Samples, picks: Mapping[str, Pick]) -> PickTable:
    """Score what rules picked of these samples.

    >>> import numpy as np
    >>> from steer.decoding import Samples, best_of
    >>> from steer.evaluation import pick_table
    >>> signals = {"sure": np.array([[0.1, 0.9], [0.2, 0.1]])}
    >>> samples = Samples(np.array([[0, 1], [0, 1]]), np.array([[False, True], [True, False]]),
    ...                   np.array([[5, 6], [5, 5]]), signals)
    >>> pick_table(samples, {"best": best_of(samples, "sure")})["best"].over_majority
    0.5
    """
    votes = [majority(samples.first(k + 1)) for k in range(samples.votes.shape[1])]
    costs, right = np.array([v.tokens.mean() for v in votes]), np.array([v.correct for v in votes], dtype=float)
    return PickTable(len(votes), tuple(_score(name, pick, costs, right) for name, pick in picks.items()))


def score_signals(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    task: Task,
    signals: Mapping[str, Float[np.ndarray, " n"]],
) -> SignalTable:
    """How well each signal of some completions tells right from wrong (`probes.evidence.signal_table`).

    >>> import numpy as np
    >>> from probes import generate, load
    >>> from steer import task_named
    >>> from steer.evaluation import score_signals
    >>> model, task = load("organism"), task_named("chains")
    >>> problems = task.sample(8, "select")
    >>> made = generate(model, [p.question for p in problems], ids=[p.id for p in problems])
    >>> score_signals(made, problems, task, {"long": np.array([float(len(c.ids)) for c in made])})["long"].n
    8
    """
    gold = {problem.id: problem for problem in problems}
    correct = np.array([is_correct(c, gold[c.id], task.grader) for c in completions])
    length = np.array([c.thinking_tokens for c in completions])
    return signal_table(signals, correct, [c.id for c in completions], length)


def standard_picks(samples: Samples) -> dict[str, Pick]:
    """The first sample, majority vote, and for each signal of the samples: best of n, the vote weighted by the chance
    of being right that it gives, and the first sample that passes a threshold. What is fitted is cross-validated by
    problem.

    >>> import numpy as np
    >>> from steer.decoding import Samples
    >>> from steer.evaluation import standard_picks
    >>> rng = np.random.default_rng(0)
    >>> sure = rng.random((40, 3))
    >>> samples = Samples(rng.integers(2, size=(40, 3)), sure > 0.5, np.ones((40, 3), dtype=int), {"sure": sure})
    >>> list(standard_picks(samples))
    ['first sample', 'majority', 'best by sure', 'vote by sure', 'first past sure']
    """
    picks = {"first sample": majority(samples.first(1)), "majority": majority(samples)}
    for name in samples.signals:

        def vote(train: Samples, test: Samples, name: str = name) -> Pick:
            return majority(test, chances(train, name)(test))

        def first_past(train: Samples, test: Samples, name: str = name) -> Pick:
            return accept_early(test, name, acceptance_threshold(train, name))

        picks[f"best by {name}"] = best_of(samples, name)
        picks[f"vote by {name}"] = cross_validated(samples, vote)
        picks[f"first past {name}"] = cross_validated(samples, first_past)
    return picks


def _score(name: str, pick: Pick, costs: Float[np.ndarray, " k"], right: Float[np.ndarray, "k problems"]) -> PickScore:
    own, spent = pick.correct.astype(float), float(pick.tokens.mean())
    at = float(np.interp(spent, costs, np.arange(len(costs))))
    below, share = int(at), at - int(at)
    equal = (1 - share) * right[below] + share * right[min(below + 1, len(right) - 1)]
    over, at_equal = own - right[-1], own - equal
    return PickScore(
        name, len(own), float(pick.drawn.mean()), spent,
        float(own.mean()), interval_of_mean(own),
        float(over.mean()), interval_of_mean(over),
        float(at_equal.mean()), interval_of_mean(at_equal),
    )  # fmt: skip
