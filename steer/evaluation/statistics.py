"""Intervals and tests of paired arms: over problems, never over samples."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float

from probes.late import stats


def interval_of_mean(per_problem: Float[np.ndarray, " problems"]) -> tuple[float, float]:
    """95 % percentile bootstrap over problems (Efron 1979), 2,000 resamples, seed 0.

    Of differences of two arms, problem by problem, it is the paired bootstrap. NaN for fewer than two problems.

    >>> import numpy as np
    >>> from steer.evaluation import interval_of_mean
    >>> interval_of_mean(np.array([0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]))
    (0.5, 1.0)
    """
    if len(per_problem) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(0)
    result = stats.bootstrap((per_problem,), np.mean, n_resamples=2_000, method="percentile", rng=rng)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_p(own: Bool[np.ndarray, "problems samples"], other: Bool[np.ndarray, "problems others"]) -> float:
    """Two-sided p that two arms are right equally often, from the same problems.

    One sample a problem in both: McNemar's exact test. The same number of several: Wilcoxon's signed-rank test of the
    problems' differences, which are symmetric about 0 where the arms are alike. Unequal numbers, as of a null whose
    draws are pooled: that symmetry is gone, and the t-test of the mean difference is used. 1 where no problem differs.

    >>> import numpy as np
    >>> from steer.evaluation import paired_p
    >>> right, wrong = np.ones((6, 1), dtype=bool), np.zeros((6, 1), dtype=bool)
    >>> paired_p(right, wrong), paired_p(right, right)
    (0.03125, 1.0)
    """
    if own.shape[1] == other.shape[1] == 1:
        return mcnemar(own[:, 0], other[:, 0])
    differences = own.mean(1) - other.mean(1)
    if not differences.any():
        return 1.0
    if own.shape[1] == other.shape[1]:
        return float(stats.wilcoxon(differences).pvalue)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def mcnemar(own: Bool[np.ndarray, " problems"], other: Bool[np.ndarray, " problems"]) -> float:
    """McNemar's exact test (1947): of the problems on which the arms differ, each arm is right on half.

    Two-sided; 1 where they differ on none.

    >>> import numpy as np
    >>> from steer.evaluation import mcnemar
    >>> mcnemar(np.ones(6, dtype=bool), np.zeros(6, dtype=bool))
    0.03125
    """
    gained, lost = int((own & ~other).sum()), int((other & ~own).sum())
    return 1.0 if gained + lost == 0 else _half(gained, gained + lost)


@lru_cache(maxsize=4096)  # a table of many arms asks for the same few
def _half(gained: int, differing: int) -> float:
    return float(stats.binomtest(gained, differing).pvalue)


def adjusted(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values of many arms, adjusted so that a cut at 5 % keeps the expected share of false finds at 5 %.

    Benjamini and Hochberg (1995): over ranks i of m, the least p_(j) m / j of all j >= i.

    >>> from steer.evaluation import adjusted
    >>> adjusted({"edited": 0.01, "random": 0.5})
    {'edited': 0.02, 'random': 0.5}
    """
    if not p_values:
        return {}
    return dict(zip(p_values, stats.false_discovery_control(list(p_values.values())).tolist(), strict=True))
