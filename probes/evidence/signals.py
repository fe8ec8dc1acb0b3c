"""Which signal of a chain tells right from wrong: over all chains, among chains as long, and within a problem."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from probes.tables import Shown, Table

Interval = tuple[float, float]
STRATA = 5


@dataclass(frozen=True)
class SignalScore:
    """The chance that a right chain's signal is above a wrong one's (ties half), of all pairs; of pairs that are in one
    stratum of length; and of pairs that answer one problem. 95 % intervals, by problem. `n` chains have the signal.

    >>> from probes.evidence import SignalScore
    >>> SignalScore("net", 90, 0.7, (0.6, 0.8), 0.5, (0.4, 0.6), 0.5, (0.4, 0.6)).auroc
    0.7
    """

    name: str
    n: int
    auroc: float
    interval: Interval
    within_length: float
    within_length_interval: Interval
    within_problem: float
    within_problem_interval: Interval


@dataclass(frozen=True, eq=False, repr=False)
class SignalTable(Shown):
    """Signals of `n` chains, of which `right` are, over `problems`.

    >>> import numpy as np
    >>> from probes.evidence import signal_table
    >>> correct = np.array([True, False, True, False])
    >>> signal_table({"sure": np.array([3.0, 1.0, 2.0, 0.0])}, correct, ["a", "a", "b", "b"], np.array([9, 9, 9, 9])).n
    4
    """

    n: int
    right: int
    problems: int
    scores: tuple[SignalScore, ...]

    def __getitem__(self, name: str) -> SignalScore:
        """The score of a signal. Raises KeyError, with those that are known."""
        for score in self.scores:
            if score.name == name:
                return score
        raise KeyError(f"{name!r} is none of these signals. Known: {', '.join(score.name for score in self.scores)}.")

    def table(self) -> Table:
        """A row for each signal, the highest AUROC within a length first."""
        columns = ("signal", "chains", "AUROC [95 %]", "within length [95 %]", "within problem [95 %]")
        rows = [
            (s.name, s.n, _said(s.auroc, s.interval), _said(s.within_length, s.within_length_interval),
             _said(s.within_problem, s.within_problem_interval))
            for s in sorted(self.scores, key=lambda s: -np.nan_to_num(s.within_length))
        ]  # fmt: skip
        return Table(columns, tuple(rows), f"{self.n} chains of {self.problems} problems, {self.right} right")


def signal_table(
    signals: Mapping[str, Float[np.ndarray, " n"]],
    correct: Bool[np.ndarray, " n"],
    problems: Sequence[Hashable],
    length: Float[np.ndarray, " n"] | Int[np.ndarray, " n"],
    *,
    strata: int = STRATA,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> SignalTable:
    """Of each signal, oriented so that more of it should mean right: how well it tells right from wrong.

    Most such signals are length in disguise: so the same among chains of about one length, in `strata` of equal size;
    and within a problem, which is what choosing among samples needs. Chains without a signal (NaN) are left out of its
    row. Intervals are bootstraps over problems. Raises ValueError where the numbers of chains differ.

    >>> import numpy as np
    >>> from probes.evidence import signal_table
    >>> rng = np.random.default_rng(0)
    >>> length = rng.integers(10, 200, 400)
    >>> correct = rng.random(400) < 1 - length / 220
    >>> found = signal_table({"length": -length.astype(float)}, correct, [i // 4 for i in range(400)], length)
    >>> found["length"].auroc > 0.75, found["length"].within_length < 0.65
    (True, True)
    """
    sizes = {len(values) for values in (*signals.values(), correct, problems, length)}
    if len(sizes) > 1:
        raise ValueError(
            f"Signals, answers, problems and lengths are of the same chains, but there are {sorted(sizes)}."
        )
    groups = numbered(problems)
    cuts = np.quantile(length, np.linspace(0, 1, strata + 1)[1:-1]) if len(length) else np.zeros(0)
    by_length = np.searchsorted(cuts, length, side="left")
    counts = np.random.default_rng(seed).multinomial(
        groups.max(initial=0) + 1, np.full(groups.max(initial=0) + 1, 1 / (groups.max(initial=0) + 1)), n_bootstrap
    )
    whole = _Pairs(correct, groups, by_length, np.concatenate([np.ones_like(counts[:1]), counts]))
    scores = tuple(whole.score(name, np.asarray(values, dtype=float)) for name, values in signals.items())
    return SignalTable(len(correct), int(correct.sum()), int(groups.max(initial=-1)) + 1, scores)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Chains, and how many times each problem counts, in the data (row 0) and in each resample of it."""

    correct: Bool[np.ndarray, " n"]
    groups: Int[np.ndarray, " n"]
    by_length: Int[np.ndarray, " n"]
    counts: Int[np.ndarray, "draws problems"]

    @cached_property
    def weights(self) -> Float[np.ndarray, "draws n"]:
        return self.counts[:, self.groups].astype(float)

    def score(self, name: str, values: Float[np.ndarray, " n"]) -> SignalScore:
        known = ~np.isnan(values)
        everything = np.zeros_like(self.by_length)
        found = [self._over(values, known, strata) for strata in (everything, self.by_length)]
        found.append(self._within_problems(values, known))
        (whole, a), (by_length, b), (by_problem, c) = map(_estimate, found)
        return SignalScore(name, int(known.sum()), whole, a, by_length, b, by_problem, c)

    def _over(self, values: np.ndarray, known: np.ndarray, strata: np.ndarray) -> Float[np.ndarray, " draws"]:
        """AUROC of the pairs that are in one stratum, each as often as its problems were drawn."""
        above, pairs = np.zeros(len(self.counts)), np.zeros(len(self.counts))
        for stratum in np.unique(strata[known]):
            at = known & (strata == stratum)
            won, of = _pairs_won(values[at], self.correct[at], self.weights[:, at])
            above, pairs = above + won, pairs + of
        with np.errstate(invalid="ignore"):
            return np.asarray(above / pairs)

    def _within_problems(self, values: np.ndarray, known: np.ndarray) -> Float[np.ndarray, " draws"]:
        """A problem that was drawn twice is two problems."""
        n = self.counts.shape[1]
        above, pairs = np.zeros(n), np.zeros(n)
        for group in range(n):
            at = known & (self.groups == group)
            won, of = _pairs_won(values[at], self.correct[at], np.ones((1, int(at.sum()))))
            above[group], pairs[group] = won[0], of[0]
        with np.errstate(invalid="ignore"):
            return np.asarray((self.counts @ above) / (self.counts @ pairs))


def _pairs_won(
    values: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "draws n"]
) -> tuple[Float[np.ndarray, " draws"], Float[np.ndarray, " draws"]]:
    """Of the pairs of a right and a wrong chain, those in which the right one's value is larger, ties half; and all."""
    right, wrong = weights * correct, weights * ~correct
    if not len(values):
        return np.zeros(len(weights)), np.zeros(len(weights))
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    right, wrong = (np.add.reduceat(part[:, order], starts, axis=1) for part in (right, wrong))
    below = wrong.cumsum(1) - wrong / 2
    return (right * below).sum(1), right.sum(1) * wrong.sum(1)


def _estimate(draws: Float[np.ndarray, " draws"]) -> tuple[float, Interval]:
    """The value of the data, and the interval of the resamples that have one."""
    known = draws[1:][~np.isnan(draws[1:])]
    if np.isnan(draws[0]) or not len(known):
        return float(draws[0]), (float("nan"), float("nan"))
    low, high = np.quantile(known, (0.025, 0.975))
    return float(draws[0]), (float(low), float(high))


def numbered(problems: Sequence[Hashable]) -> Int[np.ndarray, " n"]:
    """The number of each one's problem, in the order in which they first come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(problem, len(numbers)) for problem in problems], dtype=int)


def pass_rates(correct: Bool[np.ndarray, "problems samples"]) -> Float[np.ndarray, " problems"]:
    """How easy each problem is: the share of its samples that are right. Its difficulty is what is left to 1.

    >>> import numpy as np
    >>> from probes.evidence import pass_rates
    >>> pass_rates(np.array([[True, False], [True, True]]))
    array([0.5, 1. ])
    """
    return np.asarray(correct.mean(1))


def verbosity(
    length: Int[np.ndarray, "problems samples"], correct: Bool[np.ndarray, "problems samples"]
) -> Float[np.ndarray, "problems samples"]:
    """How many times as long each chain is as the shortest right one of its problem; NaN where none is right.

    >>> import numpy as np
    >>> from probes.evidence import verbosity
    >>> verbosity(np.array([[10, 20], [5, 5]]), np.array([[True, True], [False, False]]))
    array([[ 1.,  2.],
           [nan, nan]])
    """
    shortest = np.where(correct, length, np.inf).min(1, keepdims=True)
    return np.where(np.isinf(shortest), np.nan, length / shortest)


def _said(value: float, interval: Interval) -> str:
    return "" if np.isnan(value) else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
