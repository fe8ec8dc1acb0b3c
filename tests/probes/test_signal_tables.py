"""Signals against brute force over pairs, length in disguise found out; confidences against what they say they mean."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from probes import Sampling, generate, load
from probes.activations import confidences, read_trajectories
from probes.evidence import calibration, pass_rates, read_signals, signal_table, stated_confidence, verbosity
from probes.evidence.reliability import ASK_CONFIDENCE
from probes.evidence.signals import numbered
from probes.generation import forced_answers
from probes.thinking import equations_hold


def pairs_won(values, correct, keep):
    """Every pair of a right and a wrong chain, ties half."""
    won = [
        (values[i] > values[j]) + (values[i] == values[j]) / 2
        for i, j in product(range(len(values)), repeat=2)
        if correct[i] and not correct[j] and keep(i, j) and not np.isnan(values[i]) and not np.isnan(values[j])
    ]
    return np.mean(won) if won else np.nan


def chains(seed, n=60, per=4):
    rng = np.random.default_rng(seed)
    length = rng.integers(5, 40, n)
    correct = rng.random(n) < 1 / (1 + np.exp((length - 22) / 6))
    problems = [f"p{i // per}" for i in range(n)]
    values = rng.integers(0, 6, n) - length / 10 + correct
    values[rng.random(n) < 0.1] = np.nan
    return rng, length, correct, problems, values.round()


@pytest.mark.parametrize("seed", range(4))
def test_aurocs_are_brute_force_over_pairs_ties_and_gaps_included(seed):
    rng, length, correct, problems, values = chains(seed)
    order = rng.permutation(len(length))
    length, correct, values, problems = length[order], correct[order], values[order], [problems[i] for i in order]
    strata = np.searchsorted(np.quantile(length, (0.2, 0.4, 0.6, 0.8)), length)
    found = signal_table({"x": values}, correct, problems, length)["x"]
    assert found.n == (~np.isnan(values)).sum() < 60
    assert found.auroc == pytest.approx(pairs_won(values, correct, lambda i, j: True))  # noqa: ARG005
    assert found.within_length == pytest.approx(pairs_won(values, correct, lambda i, j: strata[i] == strata[j]))
    assert found.within_problem == pytest.approx(pairs_won(values, correct, lambda i, j: problems[i] == problems[j]))
    turned = signal_table({"x": -values}, correct, problems, length)["x"]
    for name in ("auroc", "within_length", "within_problem"):
        assert getattr(turned, name) == pytest.approx(1 - getattr(found, name))
    one = signal_table({"x": values}, correct, problems, length, strata=1)["x"]
    assert one.within_length == pytest.approx(found.auroc)


@pytest.mark.parametrize("seed", range(3))
def test_the_intervals_are_those_of_problems_drawn_again(seed):
    """Of each resample brute force over its own chains; a problem that was drawn twice is two problems."""
    rng, length, correct, problems, values = chains(seed, n=24, per=3)
    draws, found = [], signal_table({"x": values}, correct, problems, length, n_bootstrap=4000)["x"]
    groups = numbered(problems)
    for _ in range(300):
        picked = rng.integers(0, 8, 8)
        rows = np.concatenate([np.flatnonzero(groups == g) for g in picked])
        own = np.repeat(np.arange(8), 3)
        draws.append(
            (
                pairs_won(values[rows], correct[rows], lambda i, j: True),  # noqa: ARG005
                pairs_won(values[rows], correct[rows], lambda i, j, own=own: own[i] == own[j]),
            )
        )
    for interval, own in zip((found.interval, found.within_problem_interval), np.array(draws).T, strict=True):
        assert interval == pytest.approx(np.nanquantile(own, (0.025, 0.975)), abs=0.1)


def planted(seed, n_problems=150, per=4):
    """Chains whose length tells whether they are right; and three signals."""
    rng = np.random.default_rng(seed)
    n = n_problems * per
    length = rng.integers(50, 2000, n)
    hidden = rng.normal(size=n)
    correct = rng.random(n) < 1 / (1 + np.exp((length - 1000) / 300 - 1.5 * hidden))
    signals = {
        "length in disguise": -(length // 50).astype(float),
        "its own": hidden + 0.3 * rng.normal(size=n),
        "noise": rng.normal(size=n),
    }
    return signals, correct, [i // per for i in range(n)], length


def test_a_signal_that_is_length_in_disguise_is_found_out_and_one_of_its_own_is_kept():
    covered = []
    for seed in range(3):
        signals, correct, problems, length = planted(seed)
        found = signal_table(signals, correct, problems, length, strata=40, n_bootstrap=200)
        disguised, own, noise = (found[name] for name in signals)
        assert disguised.auroc > 0.7
        assert disguised.interval[0] > 0.65
        covered.append(disguised.within_length_interval[0] <= 0.5 <= disguised.within_length_interval[1])
        assert own.within_length_interval[0] > 0.7
        assert own.within_problem_interval[0] > 0.6
        assert noise.auroc == pytest.approx(0.5, abs=0.06)
        assert abs(own.within_length - 0.5) > abs(disguised.within_length - 0.5)
        assert [row[0] for row in found.table().rows][0] == "its own"
    assert sum(covered) >= 2


def test_intervals_by_problem_cover_and_those_of_chains_would_not():
    """Right or wrong by problem alone, as a signal that is the problem's: 0.5, in about 95 of 100 sets."""
    inside, wide = 0, []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        correct, values = rng.random(40) < 0.5, rng.normal(size=40)
        whole = [np.repeat(x, 5) for x in (correct, values)]
        found = signal_table(
            {"x": whole[1]}, whole[0], np.repeat(np.arange(40), 5).tolist(), np.ones(200), n_bootstrap=150
        )["x"]  # fmt: skip
        inside += found.interval[0] <= 0.5 <= found.interval[1]
        wide.append(found.interval[1] - found.interval[0])
        assert math.isnan(found.within_problem)
        assert math.isnan(found.within_problem_interval[0])
    assert 105 <= inside <= 120
    assert np.mean(wide) > 0.3, "40 problems, not 200 chains"


def test_chains_without_a_signal_are_left_out_and_a_signal_that_nobody_has_has_no_score():
    values, correct = np.array([1.0, np.nan, 0.0, np.nan]), np.array([True, True, False, False])
    found = signal_table({"x": values, "none": np.full(4, np.nan)}, correct, list("aabb"), np.arange(4))
    assert (found["x"].n, found["x"].auroc) == (2, 1.0)
    assert found["none"].n == 0
    assert all(math.isnan(x) for x in (found["none"].auroc, found["none"].within_length, *found["none"].interval))
    same = signal_table({"x": values}, np.ones(4, dtype=bool), list("aabb"), np.arange(4))["x"]
    assert math.isnan(same.auroc)
    empty = signal_table({"x": np.zeros(0)}, np.zeros(0, dtype=bool), [], np.zeros(0))
    assert (empty.n, empty.problems, empty["x"].n) == (0, 0, 0)
    flat = signal_table({"x": np.ones(4)}, correct, list("abab"), np.arange(4))["x"]
    assert (flat.auroc, flat.within_problem) == (0.5, 0.5)
    infinite = signal_table({"x": np.array([np.inf, 0.0, -np.inf, 1.0])}, correct, list("abab"), np.arange(4))["x"]
    assert infinite.auroc == 0.75


def test_what_a_table_is_not_made_of_is_refused():
    with pytest.raises(
        ValueError, match=r"^Signals, answers, problems and lengths are of the same chains, but there are \[2, 3\]\.$"
    ):
        signal_table({"x": np.ones(2)}, np.array([True, False]), ["a", "b", "c"], np.arange(2))
    found = signal_table({"x": np.ones(2)}, np.array([True, False]), ["a", "b"], np.arange(2))
    with pytest.raises(KeyError, match=r"'y' is none of these signals\. Known: x\."):
        found["y"]


PROGRAM = """
import numpy as np
from probes.evidence import calibration, signal_table
rng = np.random.default_rng(3)
x, correct, length = rng.normal(size=80), rng.random(80) < .5, rng.integers(1, 99, 80)
problems = [f"problem {i // 4}" for i in range(80)]
print(signal_table({"x": x, "y": -x}, correct, problems, length, n_bootstrap=50).scores)
print(calibration(rng.random(80), correct, problems, n_bootstrap=50).ece_interval)
"""


def test_the_numbers_are_the_same_whatever_the_hashes_are():
    told = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("0", "77")
    }  # fmt: skip
    assert len(told) == 1
    assert b"SignalScore" in told.pop()


@pytest.mark.parametrize("bins", [1, 5, 10, 15])
@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_is_its_definition_and_brier_is_the_sum_of_its_parts(bins, seed):
    rng = np.random.default_rng(seed)
    confidence = np.concatenate([rng.random(200), [0.0, 1.0, 1.0]])
    correct = rng.random(203) < confidence**2
    found = calibration(confidence, correct, [i // 3 for i in range(203)], bins=bins, n_bootstrap=20)
    ece, at = 0.0, np.minimum(np.floor(confidence * bins), bins - 1)
    rates = {}
    for b in range(bins):
        if (own := at == b).any():
            rates[b] = (own.sum(), confidence[own].mean(), correct[own].mean())
            ece += own.mean() * abs(rates[b][1] - rates[b][2])
    assert found.ece == pytest.approx(ece, abs=1e-12)
    np.testing.assert_allclose([(b.n, b.confidence, b.accuracy) for b in found.bins], list(rates.values()))
    assert found.brier == pytest.approx(((confidence - correct) ** 2).mean(), abs=1e-12)
    assert abs(found.reliability - found.resolution + found.uncertainty + found.within - found.brier) < 1e-12
    assert found.reliability == pytest.approx(sum(n * (c - a) ** 2 for n, c, a in rates.values()) / 203)
    assert found.resolution == pytest.approx(sum(n * (a - correct.mean()) ** 2 for n, _, a in rates.values()) / 203)
    spread = sum(
        ((confidence[at == b] - c) ** 2).sum() - 2 * ((confidence[at == b] - c) * (correct[at == b] - a)).sum()
        for b, (_, c, a) in rates.items()
    )  # fmt: skip
    assert found.within == pytest.approx(spread / 203, abs=1e-12), "what the spread inside the bins adds"
    low, high = found.ece_interval
    assert low < high
    assert found.brier_interval[0] < found.brier < found.brier_interval[1]


def test_a_perfect_forecasters_error_is_what_chance_says():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        confidence = rng.random(150)
        found.append(calibration(confidence, rng.random(150) < confidence, range(150), n_bootstrap=100))
    assert np.mean([f.ece for f in found]) == pytest.approx(np.mean([f.ece_chance for f in found]), rel=0.1)
    assert np.mean([f.ece for f in found]) > 0.03
    wrong = calibration(np.full(150, 0.9), rng.random(150) < 0.3, range(150))
    assert wrong.ece > 5 * wrong.ece_chance


def test_what_is_no_confidence_is_refused():
    for value in (-0.1, 1.0001, math.nan, 85.0):
        with pytest.raises(ValueError, match=r"^A confidence is a number between 0 and 1, but .* was given\."):
            calibration(np.array([0.5, value]), np.array([True, False]), [0, 1])
    with pytest.raises(ValueError, match=r"^2 confidences came with 2 answers, 1 problems: give one each\.$"):
        calibration(np.array([0.5, 0.5]), np.array([True, False]), [0])
    with pytest.raises(ValueError, match="^0 confidences"):
        calibration(np.zeros(0), np.zeros(0, dtype=bool), [])


STATED = {
    "Confidence: 85%": 0.85, "confidence: 85 %": 0.85, "CONFIDENCE: 85%": 0.85, "My confidence is 0.85.": 0.85,
    "Confidence: 85": 0.85, "**Confidence:** 85%": 0.85, "Confidence: **85%**": 0.85, "Confidence level: 9/10": 0.9,
    "Confidence: 9 / 10": 0.9, "Confidence: 85/100": 0.85, "Confidence: 85 out of 100": 0.85, "Confidence: 4/5": 0.8,
    "Confidence: 9 out of 10": 0.9, "Confidence: 1": 1.0, "Confidence: 1%": 0.01, "Confidence: 0": 0.0,
    "Confidence: 1 percent": 0.01, "Confidence: 0.5%": 0.005, "Confidence: 0.5": 0.5, "Confidence: .5": 0.5,
    "Confidence: 1\\%": 0.01, "Confidence: $85\\%$": 0.85, "Confidence (0-100): 85": 0.85,
    "Confidence (0-100%): 85%": 0.85, "Confidence (from 0 to 1): 0.85": 0.85, "Confidence = 100%": 1.0,
    "Confidence: 40%. No. Confidence: 60%": 0.6, "Confidence: 0,85": 0.85, "Confidence: 100.0%": 1.0,
    "Confidence: 10/10": 1.0, "state it as 'Confidence: N%'. 7. Confidence: 70%": 0.7, "Confidence:\n85%": 0.85,
    "Confidence: 12.5%": 0.125, "Confidence: 85%, since 3 of 4 checks hold": 0.85, "Confidence: 0.9/1": 0.9,
    "Confidence: ~85%": 0.85, "Confidence: about 85 per cent": 0.85, "I am 85% confident": None, "7": None, "": None,
    "Confidence: high": None, "Confidence: 150%": None, "Confidence: 11/10": None, "Confidence: -5%": None,
    "Confidence: 5/0": None, "Confidence: N%": None, ASK_CONFIDENCE: None,
    "Confidence: high. The answer is 7.": None, "Overconfidence: 85%": None,
}  # fmt: skip


def test_stated_confidences_are_read_as_they_are_meant():
    assert {text: stated_confidence(text) for text in STATED} == pytest.approx(STATED)


def test_pass_rates_and_verbosity():
    correct, length = (
        np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=bool),
        np.array([[30, 10, 20], [5, 5, 5], [8, 4, 2]]),
    )
    assert pass_rates(correct).tolist() == pytest.approx([2 / 3, 0, 1 / 3])
    assert verbosity(length, correct)[[0, 2]].tolist() == [[1.5, 0.5, 1.0], [2.0, 1.0, 0.5]]
    assert np.isnan(verbosity(length, correct)[1]).all()
    assert numbered(["b", "a", "b", 3]).tolist() == [0, 1, 0, 2]


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def completions(organism):
    made = generate(organism, ["a 3 b +4 c *7", "a 3 quick"], samples=2, sampling=Sampling(1.0, max_new_tokens=40))
    return [*made, replace(made[0], span=None, thinking=None)]


def test_each_signal_is_its_own_reading_and_more_of_it_should_mean_right(organism, completions):
    found = read_signals(organism, completions, segment=3, rules="organism", holds=lambda t: "=7" not in t[-1])
    chains, tokens = read_trajectories(organism, completions, segment=3), confidences(organism, completions)
    stops = [[] if c.span is None else [c.span.text_end] for c in completions]
    forced = [row[0] if row else None for row in forced_answers(organism, completions, stops)]
    nan = math.nan
    wanted = {
        "net": [c.scores()["net"] for c in chains],
        "cumulative": [-c.scores()["cumulative"] for c in chains],
        "aligned": [c.scores()["aligned"] for c in chains],
        "layer magnitude": [c.magnitude for c in chains],
        "layer angle": [-c.angle for c in chains],
        "margin": [nan if f is None else f.margin for f in forced],
        "answer entropy": [nan if f is None else -f.entropy for f in forced],
        "answer perplexity": [nan if f is None else -f.perplexity for f in forced],
        "log-probability": [c.log_probability for c in tokens],
        "entropy": [-c.entropy for c in tokens],
        "brevity": [-c.thinking_tokens for c in completions],
    }
    assert set(found) == {*wanted, "failed steps"}
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], np.array(values, dtype=float), rtol=1e-4, atol=1e-5, err_msg=name)
        assert name == "brevity" or np.isnan(found[name][-1])
    assert -1 <= np.nanmin(found["failed steps"]) < np.nanmax(found["failed steps"]) <= 0
    given = read_signals(organism, completions, ["margin"], forced=[None, *forced[1:]])["margin"]
    assert np.isnan(given[[0, -1]]).all()
    np.testing.assert_allclose(given[1:-1], found["margin"][1:-1], atol=1e-5)


def test_signals_that_cannot_be_read_are_refused(organism, completions):
    with pytest.raises(ValueError, match=r"The signal 'net' is read off a model: name the one that wrote"):
        read_signals(None, completions, ["brevity", "net"])
    assert read_signals(None, completions, ["brevity"])["brevity"][-1] == 0
    with pytest.raises(ValueError, match=r"^Failed steps are told by a check of each step: give holds=\.\.\., such as"):
        read_signals(organism, completions, ["failed steps"])
    with pytest.raises((ValueError, TypeError), match="luck"):
        read_signals(organism, completions, ["luck"])
    with pytest.raises(ValueError, match=r"^2 forced answers came with 5 completions: give one each\.$"):
        read_signals(organism, completions, ["margin"], forced=[None, None])
    none = read_signals(organism, completions, ["failed steps"], holds=equations_hold, rules="organism")
    assert np.isnan(none["failed steps"]).all()
