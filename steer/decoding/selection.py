"""Which of several completions to trust: votes, signals, and how many tokens it took to know."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from probes.directions._logistic import fit_logistic
from probes.generation.completions import Completion, by_problem
from probes.late import special
from probes.tables import Brief
from steer.tasks.grading import answer_key, grade
from steer.tasks.task import Problem, Task

NO_ANSWER = -1
FEW_WRONG = 15  # answers, below which the threshold is the median
QUANTILES = np.arange(0.20, 0.995, 0.01)


@dataclass(frozen=True, eq=False, repr=False)
class Samples(Brief):
    """Samples of each problem, in the order in which they were drawn. `votes` number the answers of a problem, the same
    where two state the same, -1 where one states none; `tokens` are all that were generated. More of a signal means
    right; NaN where a chain has none.

    >>> from probes import Sampling, generate, load
    >>> from steer import task_named
    >>> from steer.decoding import Samples, best_of, majority
    >>> model, task = load("organism"), task_named("chains")
    >>> problems = task.sample(3, "select")
    >>> prompts, ids = [p.question for p in problems], [p.id for p in problems]
    >>> made = generate(model, prompts, ids=ids, samples=4, sampling=Sampling(temperature=1.0, max_new_tokens=48))
    >>> samples = Samples.of(made, problems, task, {"short": [-len(c.ids) for c in made]})
    >>> samples.votes.shape, majority(samples).correct.tolist(), best_of(samples, "short").tokens.tolist()
    ((3, 4), [True, True, False], [54, 60, 24])
    """

    votes: Int[np.ndarray, "problems samples"]
    correct: Bool[np.ndarray, "problems samples"]
    tokens: Int[np.ndarray, "problems samples"]
    signals: Mapping[str, Float[np.ndarray, "problems samples"]]

    @classmethod
    def of(
        cls,
        completions: Sequence[Completion],
        problems: Sequence[Problem],
        task: Task,
        signals: Mapping[str, Sequence[float] | Float[np.ndarray, " n"]] | None = None,
    ) -> "Samples":
        """Completions graded by their task; `signals` are a number for each completion, in their order.

        Raises ValueError where problems have different numbers of samples, or a signal has another number of values.
        """
        place = {(c.id, c.sample): n for n, c in enumerate(completions)}
        groups = by_problem(completions)
        rows = [sorted(groups[p.id], key=lambda c: c.sample) for p in problems]
        if len({len(row) for row in rows}) > 1:
            raise ValueError(
                f"Problems have {min(map(len, rows))} to {max(map(len, rows))} samples: give as many each."
            )
        at = np.array([[place[c.id, c.sample] for c in row] for row in rows])
        values = {name: np.asarray(signal, dtype=float) for name, signal in (signals or {}).items()}
        if bad := [name for name, signal in values.items() if signal.shape != (len(completions),)]:
            raise ValueError(f"The signal {bad[0]!r} has not one number for each of {len(completions)} completions.")
        pairs = list(zip(problems, rows, strict=True))
        return cls(
            np.array([_numbered([answer_key(c, task.grader) for c in row]) for row in rows]),
            np.array([[grade(c, p, task.grader).correct for c in row] for p, row in pairs]),
            np.array([[len(c.ids) for c in row] for row in rows]),
            {name: signal[at] for name, signal in values.items()},
        )

    def only(self, problems: np.ndarray) -> "Samples":
        """Some of the problems."""
        signals = {name: values[problems] for name, values in self.signals.items()}
        return Samples(self.votes[problems], self.correct[problems], self.tokens[problems], signals)

    def first(self, k: int) -> "Samples":
        """The first k samples of each problem. Raises ValueError where there are fewer."""
        if not 1 <= k <= self.votes.shape[1]:
            raise ValueError(f"{k} samples of each problem are asked for, of {self.votes.shape[1]}.")
        signals = {name: values[:, :k] for name, values in self.signals.items()}
        return Samples(self.votes[:, :k], self.correct[:, :k], self.tokens[:, :k], signals)

    def with_signal(self, name: str, values: Float[np.ndarray, "problems samples"]) -> "Samples":
        """The same samples with a signal more."""
        return replace(self, signals={**self.signals, name: values})

    def signal(self, name: str) -> Float[np.ndarray, "problems samples"]:
        """Raises ValueError for one that is not known."""
        if name not in self.signals:
            raise ValueError(f"{name!r} is none of these signals. Known: {', '.join(self.signals) or 'none'}.")
        return self.signals[name]


@dataclass(frozen=True, eq=False, repr=False)
class Pick(Brief):
    """Which sample stands for each problem, whether it is right, how many samples were drawn, and how many
    tokens were generated in all.

    >>> import numpy as np
    >>> from steer.decoding import Samples, majority
    >>> samples = Samples(np.array([[0, 1, 1]]), np.array([[False, True, True]]), np.array([[5, 6, 7]]), {})
    >>> pick = majority(samples)
    >>> pick.sample.tolist(), pick.correct.tolist(), pick.tokens.tolist()
    ([1], [True], [18])
    """

    sample: Int[np.ndarray, " problems"]
    correct: Bool[np.ndarray, " problems"]
    drawn: Float[np.ndarray, " problems"]
    tokens: Int[np.ndarray, " problems"]


def majority(samples: Samples, weights: Float[np.ndarray, "problems samples"] | None = None) -> Pick:
    """The answer that most samples give (self-consistency, Wang et al. 2023), or that has the largest sum of `weights`;
    of equals the one that was given first.

    >>> import numpy as np
    >>> from steer.decoding import Samples, majority
    >>> samples = Samples(np.array([[0, 1, 1]]), np.array([[True, False, False]]), np.array([[5, 6, 7]]), {})
    >>> majority(samples).correct.tolist(), majority(samples, np.array([[3.0, 1.0, 1.0]])).correct.tolist()
    ([False], [True])
    """
    votes = samples.votes
    own = (votes != NO_ANSWER) * (np.ones(votes.shape) if weights is None else np.nan_to_num(weights))
    support = ((votes[:, :, None] == votes[:, None, :]) * own[:, None, :]).sum(2)
    return _picked(samples, np.where(votes == NO_ANSWER, -np.inf, support).round(9).argmax(1), samples.tokens.sum(1))


def best_of(samples: Samples, by: str) -> Pick:
    """The sample with most of a signal (best-of-n); of equals the one that was drawn first. A chain without it is last.

    >>> import numpy as np
    >>> from steer.decoding import Samples, best_of
    >>> sure = {"sure": np.array([[0.1, 0.9]])}
    >>> best_of(Samples(np.array([[0, 1]]), np.array([[True, False]]), np.array([[5, 6]]), sure), "sure").sample
    array([1])
    """
    values = np.nan_to_num(samples.signal(by), nan=-np.inf)
    return _picked(samples, values.argmax(1), samples.tokens.sum(1))


def accept_early(samples: Samples, by: str, threshold: float) -> Pick:
    """Samples are drawn one after another until one has the signal above or at `threshold`, which is taken; where none
    has, all vote *(Vilas et al. 2025)*. Only what was drawn is counted.

    >>> import numpy as np
    >>> from steer.decoding import Samples, accept_early
    >>> sure = {"sure": np.array([[0.1, 0.9, 0.2]])}
    >>> samples = Samples(np.array([[0, 1, 0]]), np.array([[False, True, False]]), np.array([[5, 6, 7]]), sure)
    >>> pick = accept_early(samples, "sure", 0.5)
    >>> pick.correct.tolist(), pick.drawn.tolist(), pick.tokens.tolist()
    ([True], [2.0], [11])
    """
    passes = np.nan_to_num(samples.signal(by), nan=-np.inf) >= threshold
    found, at = passes.any(1), passes.argmax(1)
    drawn = np.where(found, at + 1, passes.shape[1])
    spent = samples.tokens.cumsum(1)[np.arange(len(at)), drawn - 1]
    pick = _picked(samples, np.where(found, at, majority(samples).sample), spent)
    return replace(pick, drawn=drawn.astype(float))


def acceptance_threshold(samples: Samples, by: str) -> float:
    """The threshold of `accept_early` for problems that are to be fitted on, as published *(Vilas et al. 2025)*: of
    the quantiles .20 to .99 of the signal among wrong samples, the median of the two that give the highest accuracy;
    with fewer than 15 wrong samples, the signal's median.

    >>> import numpy as np
    >>> from steer.decoding import Samples, acceptance_threshold
    >>> sure = {"sure": np.array([[0.2, 0.8]])}
    >>> acceptance_threshold(Samples(np.array([[0, 1]]), np.array([[False, True]]), np.array([[5, 6]]), sure), "sure")
    0.5
    """
    values = samples.signal(by)
    wrong = values[~samples.correct & ~np.isnan(values)]
    if len(wrong) < FEW_WRONG:
        return float(np.nanmedian(values)) if (~np.isnan(values)).any() else math.inf
    candidates = np.quantile(wrong, QUANTILES)
    accuracy = np.array([accept_early(samples, by, tau).correct.mean() for tau in candidates])
    return float(np.median(candidates[np.argsort(-accuracy, kind="stable")[:2]]))


def early_path(samples: Samples, by: str, at: int) -> Pick:
    """After `at` tokens of each sample the one with most of a signal, as it was then, is written to its end, and the
    others are dropped *(Vilas et al. 2025)*: they cost at most `at` tokens each.

    >>> import numpy as np
    >>> from steer.decoding import Samples, early_path
    >>> sure = {"sure": np.array([[0.1, 0.9]])}
    >>> samples = Samples(np.array([[0, 1]]), np.array([[False, True]]), np.array([[50, 60]]), sure)
    >>> early_path(samples, "sure", 20).tokens
    array([80])
    """
    pick = best_of(samples, by)
    capped = np.minimum(samples.tokens, at)
    rows = np.arange(len(capped))
    spent = capped.sum(1) + (samples.tokens - capped)[rows, pick.sample]
    return replace(pick, tokens=spent)


def combined(train: Samples, names: Sequence[str]) -> Callable[[Samples], Float[np.ndarray, "problems samples"]]:
    """Several signals as one: each standardised by mean and deviation, weighted by its absolute correlation with being
    right, all on `train` alone *(Vilas et al. 2025, who fit on a tenth of all data)*. A missing signal counts as mean.

    >>> import numpy as np
    >>> from steer.decoding import Samples, combined
    >>> signals = {"a": np.array([[0.0, 1.0]]), "b": np.array([[5.0, 5.0]])}
    >>> samples = Samples(np.array([[0, 1]]), np.array([[False, True]]), np.array([[5, 6]]), signals)
    >>> combined(samples, ["a", "b"])(samples)
    array([[-1.,  1.]])
    """
    values = np.stack([train.signal(name) for name in names]).reshape(len(names), -1)
    known = ~np.isnan(values)
    n = known.sum(1).clip(min=1)
    mean = np.where(known, values, 0.0).sum(1) / n
    deviation = np.sqrt((np.where(known, values - mean[:, None], 0.0) ** 2).sum(1) / n)
    scale, right = np.where(deviation > 0, deviation, 1.0), train.correct.reshape(-1).astype(float)
    z = np.nan_to_num((values - mean[:, None]) / scale[:, None])
    spread = z.std(1) * right.std()
    weights = np.abs(np.where(spread > 0, ((z - z.mean(1, keepdims=True)) * (right - right.mean())).mean(1), 0.0))
    weights = weights / np.where(spread > 0, spread, 1.0)
    weights = weights / (weights.sum() or 1.0)

    def of(samples: Samples) -> Float[np.ndarray, "problems samples"]:
        parts = [(samples.signal(name) - m) / s for name, m, s in zip(names, mean, scale, strict=True)]
        return np.asarray(np.tensordot(weights, np.nan_to_num(np.stack(parts)), 1))

    return of


def chances(train: Samples, by: str) -> Callable[[Samples], Float[np.ndarray, "problems samples"]]:
    """The chance of being right that a signal gives, by logistic regression on `train` alone; the mean where it is
    missing. Weights for `majority`.

    >>> import numpy as np
    >>> from steer.decoding import Samples, chances
    >>> rng = np.random.default_rng(0)
    >>> sure = rng.random((50, 4))
    >>> ones = np.ones((50, 4), dtype=int)
    >>> samples = Samples(ones, rng.random((50, 4)) < sure, ones, {"s": sure})
    >>> weights = chances(samples, "s")(samples)
    >>> bool(weights[sure > 0.9].mean() > 0.8), bool(weights[sure < 0.1].mean() < 0.2)
    (True, True)
    """
    values, right = train.signal(by).reshape(-1), train.correct.reshape(-1)
    known, rate = ~np.isnan(values), float(right.mean())
    if known.sum() < 2 or right[known].all() or not right[known].any():
        return lambda samples: np.full(samples.votes.shape, rate)
    vector, offset = fit_logistic(torch.from_numpy(values[known])[:, None], torch.from_numpy(right[known]))
    slope = float(vector[0])

    def of(samples: Samples) -> Float[np.ndarray, "problems samples"]:
        return np.nan_to_num(special.expit(samples.signal(by) * slope + offset), nan=rate)

    return of


def cross_validated(
    samples: Samples, rule: Callable[[Samples, Samples], Pick], *, folds: int = 5, seed: int = 0
) -> Pick:
    """A rule that is fitted: `rule(train, test)` picks for the problems of each fold, having seen the others alone.

    Raises ValueError where there are fewer problems than folds.

    >>> import numpy as np
    >>> from steer.decoding import Samples, accept_early, acceptance_threshold, cross_validated
    >>> rng = np.random.default_rng(0)
    >>> sure = rng.random((40, 3))
    >>> samples = Samples(np.zeros((40, 3), dtype=int), sure > 0.5, np.ones((40, 3), dtype=int), {"s": sure})
    >>> rule = lambda train, test: accept_early(test, "s", acceptance_threshold(train, "s"))
    >>> bool(cross_validated(samples, rule).drawn.mean() < 3)
    True
    """
    n = len(samples.votes)
    if n < folds or folds < 2:
        raise ValueError(f"{folds} folds of {n} problems cannot be made: give 2 or more, and as many problems.")
    fold = np.random.default_rng(seed).permutation(n) % folds
    parts = [(fold == k, rule(samples.only(fold != k), samples.only(fold == k))) for k in range(folds)]
    whole = Pick(np.zeros(n, dtype=int), np.zeros(n, dtype=bool), np.zeros(n), np.zeros(n, dtype=int))
    for rows, pick in parts:
        for name in ("sample", "correct", "drawn", "tokens"):
            getattr(whole, name)[rows] = getattr(pick, name)
    return whole


def _picked(samples: Samples, at: Int[np.ndarray, " problems"], tokens: Int[np.ndarray, " problems"]) -> Pick:
    rows = np.arange(len(at))
    return Pick(at, samples.correct[rows, at], np.full(len(at), float(samples.votes.shape[1])), tokens)


def _numbered(keys: Sequence[str | None]) -> list[int]:
    numbers: dict[str, int] = {}
    return [NO_ANSWER if key is None else numbers.setdefault(key, len(numbers)) for key in keys]
