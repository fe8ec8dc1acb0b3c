"""Is a mean over prompts other than 0, where many are looked at?"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from steer.evaluation.statistics import adjusted

_RESAMPLES, _EXACT, _COLUMNS = 2_000, 14, 128


@dataclass(frozen=True, eq=False)
class Estimates:
    """Of each effect its mean over prompts, a 95 % percentile bootstrap over prompts (`low`, `high`; Efron 1979), the
    two-sided p of no effect, and `q`, that p after Benjamini and Hochberg (1995) over all effects.

    >>> import numpy as np
    >>> from steer.causal import estimates
    >>> estimates(np.array([[1.0, 0.1], [2.0, -0.1]] * 5)).mean
    array([1.5, 0. ])
    """

    mean: Float[np.ndarray, " effects"]
    low: Float[np.ndarray, " effects"]
    high: Float[np.ndarray, " effects"]
    p: Float[np.ndarray, " effects"]
    q: Float[np.ndarray, " effects"]

    def told(self, level: float, least: float) -> Bool[np.ndarray, " effects"]:
        """The effects that are other than 0, and of a size of `least` or more; a share of about `level` is false."""
        told: np.ndarray = (self.q <= level) & (np.abs(self.mean) >= least)
        return told

    def interval(self, i: int | np.integer) -> str:
        return f"{self.low[i]:+.3f} to {self.high[i]:+.3f}"


def estimates(values: Float[np.ndarray, "prompts effects"], *, draws: int = 20_000, seed: int = 0) -> Estimates:
    """Means of paired differences over prompts, with intervals and tests, for many effects at once.

    p is that of the sign-flip test (Fisher 1935): under no effect a prompt's difference is as likely to be turned
    round. All flips are tried for up to 14 prompts, else `draws` of them, so that p is never below 1 / (draws + 1);
    fewer than 6 prompts cannot reach 5 %. NaN intervals for fewer than two prompts; an effect with a NaN has none, and
    counts for nothing.

    >>> import numpy as np
    >>> from steer.causal import estimates
    >>> noise = np.random.default_rng(0).normal(size=(20, 50))
    >>> noise[:, 7] += 3
    >>> np.flatnonzero(estimates(noise).q < 0.05)
    array([7])
    """
    n, rng = len(values), np.random.default_rng(seed)
    mean = values.mean(0)
    low, high = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    counts = rng.multinomial(n, np.full(n, 1 / n), _RESAMPLES) / n
    signs = _all_signs(n) if n <= _EXACT else rng.choice(np.array([-1.0, 1.0]), (draws, n))
    p = np.empty_like(mean)
    for start in range(0, values.shape[1], _COLUMNS):
        at = slice(start, start + _COLUMNS)
        if n > 1:
            low[at], high[at] = np.percentile(counts @ values[:, at], [2.5, 97.5], axis=0)
        as_far = (np.abs(signs @ values[:, at]) / n >= np.abs(mean[at]) * (1 - 1e-9)).sum(0)
        p[at] = as_far / len(signs) if n <= _EXACT else (1 + as_far) / (1 + len(signs))
    p = np.where(np.isnan(mean), np.nan, p)
    q = np.full_like(p, np.nan)
    known = adjusted({str(i): float(x) for i, x in enumerate(p) if not np.isnan(x)})
    q[[int(i) for i in known]] = list(known.values())
    return Estimates(mean, low, high, p, q)


def _all_signs(n: int) -> Float[np.ndarray, "flips n"]:
    """All ways to turn n signs round; the first stays, as a mean turned round whole is as far from 0."""
    bits = (np.arange(2 ** (n - 1))[:, None] >> np.arange(n - 1)) & 1
    return np.concatenate([np.ones((len(bits), 1)), 1.0 - 2.0 * bits], axis=1)
