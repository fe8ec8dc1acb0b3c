"""Arms timed in turn, so that what slows the machine slows all of them, and their ratios, round by round."""

import random
import time
from collections.abc import Callable, Mapping

import numpy as np
from scipy.stats import bootstrap

Seconds = dict[str, dict[str, np.ndarray]]


def timed(arms: Mapping[str, Callable[[], object]], rounds: int) -> Seconds:
    """Seconds of each arm in each round, by the wall's clock and by the processor's, after one run that is not counted.

    The order within a round is drawn anew, so that no arm always follows the same other.
    """
    for arm in arms.values():
        arm()
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    seconds: Seconds = {clock: {arm: np.empty(rounds) for arm in arms} for clock in clocks}
    rng = random.Random(0)
    for number in range(rounds):
        for arm in rng.sample(list(arms), len(arms)):
            before = {clock: now() for clock, now in clocks.items()}
            arms[arm]()
            for clock, now in clocks.items():
                seconds[clock][arm][number] = now() - before[clock]
    return seconds


def ratio(per_round: np.ndarray) -> tuple[float, float, float]:
    """The median of a ratio over rounds, with its 95 % bootstrap interval."""
    found = bootstrap((per_round,), np.median, n_resamples=2_000, method="percentile", rng=np.random.default_rng(0))
    return float(np.median(per_round)), float(found.confidence_interval.low), float(found.confidence_interval.high)


def in_words(found: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*found)
