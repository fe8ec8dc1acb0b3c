"""The statistics on planted data: intervals cover, nulls find nothing, effects are found, tests are their definitions.

Seeds are fixed beforehand. A count of experiments is binomial, and the quick bounds leave one chance in a thousand.
"""

from itertools import product
from math import comb

import numpy as np
import pytest
from scipy.stats import binom

from steer.evaluation.evaluation import Evaluation
from steer.evaluation.outcomes import Outcomes, repetition
from steer.evaluation.statistics import adjusted, mcnemar, paired_p
from steer.tasks.chains import TASKS
from steer.tasks.task import Problem

N = 100


def experiment(rng, effects, samples):
    """Arms of 100 problems, each of its own difficulty; an arm's chances are those of plain, moved by its effect."""
    chance = rng.beta(2, 2, N)
    arms = {"plain": chance, **{f"arm {i}": np.clip(chance + e, 0, 1) for i, e in enumerate(effects)}}
    drawn = {name: rng.random((N, samples)) < p[:, None] for name, p in arms.items()}
    problems = tuple(Problem(str(i), "q", "a") for i in range(N))
    return Evaluation(TASKS["chains"], problems, {n: Outcomes(x, np.ones(x.shape, int), ~x) for n, x in drawn.items()})


def mean_effect(effect):
    """E[clip(p + effect, 0, 1) - p] of p ~ Beta(2, 2), by quadrature."""
    p = (np.arange(200_000) + 0.5) / 200_000
    return float(np.mean((np.clip(p + effect, 0, 1) - p) * 6 * p * (1 - p)))


def covered(trials, samples, effect, seed):
    rng, truth = np.random.default_rng(seed), mean_effect(effect)
    intervals = [experiment(rng, [effect], samples).score("arm 0").difference_interval for _ in range(trials)]
    return sum(low <= truth <= high for low, high in intervals)


def false_finds(trials, samples, seed):
    """Experiments of ten arms like plain: in how many some arm is declared different, and in how many better."""
    rng = np.random.default_rng(seed)
    runs = [experiment(rng, [0.0] * 10, samples) for _ in range(trials)]
    return sum(min(adjusted(run.p_values()).values()) < 0.05 for run in runs), sum(bool(run.better()) for run in runs)


@pytest.mark.parametrize(("samples", "effect"), [(1, 0.1), (4, -0.05)])
def test_intervals_cover_the_difference_at_their_rate(samples, effect):
    low, high = binom.interval(0.999, 250, 0.945)  # a percentile interval of 100 problems covers a little below 95 %
    assert low <= covered(250, samples, effect, seed=1) <= high


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "effect"), [(1, 0.1), (1, 0.0), (4, -0.05)])
def test_intervals_of_two_thousand_experiments_cover(samples, effect):
    assert 0.925 <= covered(2_000, samples, effect, seed=2) / 2_000 <= 0.97


@pytest.mark.parametrize("samples", [1, 4])
def test_a_sweep_of_arms_without_effect_seldom_finds_one(samples):
    different, better = false_finds(200, samples, seed=3)
    assert better <= different <= binom.ppf(0.999, 200, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 4])
def test_two_thousand_sweeps_without_effect_find_a_winner_in_at_most_seven_of_a_hundred(samples):
    different, better = false_finds(2_000, samples, seed=4)
    assert better <= different <= 0.07 * 2_000


def test_planted_effects_are_found_and_the_best_comes_first():
    rng = np.random.default_rng(5)
    for samples in (1, 4):
        found = [experiment(rng, [0.0, 0.3, -0.3, 0.45], samples).better() for _ in range(20)]
        assert all(run[:1] == ["arm 3"] and "arm 1" in run and "arm 2" not in run for run in found)


@pytest.mark.parametrize("chance", [(0.5, 0.5), (8, 1)])
def test_a_control_of_pooled_draws_is_tested_at_its_rate(chance):
    """One sample against five of the same chance: Wilcoxon's test would find a difference in up to 17 of 100."""
    rng, trials = np.random.default_rng(6), 400
    found = 0
    for _ in range(trials):
        p = rng.beta(*chance, N)[:, None]
        found += paired_p(rng.random((N, 5)) < p, rng.random((N, 1)) < p) < 0.05
    assert binom.ppf(0.0005, trials, 0.05) <= found <= binom.ppf(0.9995, trials, 0.05)


def test_mcnemar_is_the_tail_of_the_binomial_of_the_problems_that_differ():
    rng = np.random.default_rng(7)
    for n in (1, 5, 20):
        own, other = rng.random((2, n)) < 0.5
        gained, lost = (own & ~other).sum(), (other & ~own).sum()
        m = gained + lost
        tail = sum(comb(m, k) for k in range(min(gained, lost) + 1)) / 2**m
        assert mcnemar(own, other) == mcnemar(other, own) == pytest.approx(min(1.0, 2 * tail), abs=1e-12)
        assert paired_p(own[:, None], other[:, None]) == mcnemar(own, other)
    assert mcnemar(own, own) == 1.0


def test_several_samples_are_compared_by_the_ranks_of_their_differences():
    """Exactly: of all signs that eight different differences could have, the share whose rank sum is as far off."""
    own = np.arange(128)[None] < np.array([70, 75, 60, 80, 90, 66, 77, 100])[:, None]
    other = np.arange(128)[None] < np.array([64, 64, 64, 64, 64, 64, 64, 64])[:, None]
    difference = np.array([6, 11, -4, 16, 26, 2, 13, 36])
    ranks = np.abs(difference).argsort().argsort() + 1
    seen = abs(np.sum(ranks * np.sign(difference)))
    sums = [abs(np.dot(ranks, signs)) for signs in product((-1, 1), repeat=8)]
    assert paired_p(own, other) == pytest.approx(np.mean([s >= seen for s in sums]), abs=1e-12)
    assert paired_p(own, own) == 1.0


def test_adjusted_p_values_are_those_of_benjamini_and_hochberg():
    rng = np.random.default_rng(8)
    p = {f"arm {i}": float(x) for i, x in enumerate(rng.random(12) ** 3)}
    ranked = sorted(p.values())
    for arm, own in adjusted(p).items():
        candidates = [ranked[j] * 12 / (j + 1) for j in range(ranked.index(p[arm]), 12)]
        assert own == pytest.approx(min(1.0, *candidates), abs=1e-12)
    assert adjusted({"only": 0.03}) == {"only": 0.03}
    assert adjusted({}) == {}


def test_repetition_is_the_share_of_four_grams_that_came_before():
    assert repetition(range(50)) == 0.0
    assert repetition([7] * 13) == pytest.approx(9 / 10)
    assert repetition([1, 2, 3, 4, 5] * 4) == pytest.approx(1 - 5 / 17)
    assert repetition([1, 2, 3]) == repetition([]) == 0.0
    assert repetition([1, 2, 1, 2, 1], n=2) == pytest.approx(0.5)


def test_the_table_says_p_adjusted_over_its_arms_accuracy_per_token_and_repetition():
    rng = np.random.default_rng(9)
    run = experiment(rng, [0.4, 0.0, 0.0], 1)
    lengths = {arm: np.full((N, 1), 50 * (i + 1)) for i, arm in enumerate(run.arms)}
    run = Evaluation(
        run.task,
        run.problems,
        {arm: Outcomes(o.correct, lengths[arm], o.truncated, np.full((N, 1), 0.25)) for arm, o in run.arms.items()},
    )
    raw = {arm: paired_p(o.correct, run.arms["plain"].correct) for arm, o in run.arms.items() if arm != "plain"}
    frame = run.to_frame().set_index("arm")
    for arm, p in adjusted(raw).items():
        score = run.score(arm)
        assert (score.p, score.p_adjusted) == (raw[arm], p)
        assert frame.loc[arm, "p (adjusted)"] == f"{p:.2g}"
        assert score.per_1000 == pytest.approx(1000 * score.accuracy / score.length)
    assert frame.loc["plain", "p (adjusted)"] == ""
    assert set(frame["repeated 4-grams"]) == {"25.0%"}
    words = run.to_dict()
    assert words["plain"]["p"] is words["plain"]["p_adjusted"] is None
    assert run.score("arm 0").p_adjusted == pytest.approx(3 * raw["arm 0"])
