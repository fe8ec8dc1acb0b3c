"""Rules that choose among samples reach what is known in closed form, and what is fitted never sees what it picks."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from probes import Sampling, generate, load
from steer import task_named
from steer.decoding import (
    Pick,
    Samples,
    accept_early,
    acceptance_threshold,
    best_of,
    chances,
    combined,
    cross_validated,
    early_path,
    majority,
)
from steer.evaluation import pick_table, standard_picks


def binary(n, k, p, seed=0, **signals):
    """Problems of two answers, 0 the right one; samples that are right with chance p, of 50 to 150 tokens."""
    rng = np.random.default_rng(seed)
    correct = rng.random((n, k)) < p
    tokens = rng.integers(50, 150, (n, k))
    perfect = correct + rng.random((n, k)) / 2
    return Samples((~correct).astype(int), correct, tokens, {"perfect": perfect, **signals})


def noisy(seed=0, n=120, k=5):
    rng = np.random.default_rng(seed)
    correct = rng.random((n, k)) < rng.random((n, 1))
    votes = np.where(correct, 0, rng.integers(-1, 4, (n, k)))
    correct = votes == 0
    signals = {"a": correct + rng.normal(size=(n, k)), "b": rng.normal(size=(n, k)) * 9 + 40 - 5 * correct}
    for values in signals.values():
        values[rng.random((n, k)) < 0.1] = np.nan
    return Samples(votes, correct, rng.integers(20, 90, (n, k)), signals)


def within(value, rate, n):
    """Four standard errors."""
    return value == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / n) + 1e-9)


@pytest.mark.parametrize(("k", "p"), [(1, 0.4), (3, 0.6), (5, 0.7), (5, 0.3)])
def test_simulated_samples_reach_what_is_known_in_closed_form(k, p):
    n = 20_000
    samples = binary(n, k, p)
    vote = sum(math.comb(k, i) * p**i * (1 - p) ** (k - i) for i in range(k // 2 + 1, k + 1))
    any_right = 1 - (1 - p) ** k
    assert within(majority(samples).correct.mean(), vote, n)
    assert within(best_of(samples, "perfect").correct.mean(), any_right, n)
    early = accept_early(samples, "perfect", 1.0)
    assert within(early.correct.mean(), any_right, n)
    assert early.drawn.mean() == pytest.approx(any_right / p, rel=0.02)
    mean = samples.tokens.mean()
    assert early.tokens.mean() == pytest.approx(mean * any_right / p, rel=0.02)
    assert majority(samples).tokens.mean() == pytest.approx(k * mean)
    for row in range(50):
        own = int(early.drawn[row])
        assert early.tokens[row] == samples.tokens[row, :own].sum()
        assert own == k or samples.correct[row, own - 1]


def test_a_vote_is_counted_by_hand_ties_gaps_and_weights_included():
    samples = noisy()
    weights = np.random.default_rng(1).integers(-2, 4, samples.votes.shape).astype(float)
    weights[::7, 2] = np.nan
    for w in (None, weights):
        pick = majority(samples, w)
        for row, votes in enumerate(samples.votes):
            support = {}
            for at, vote in enumerate(votes):
                if vote != -1:
                    own = 1.0 if w is None else 0.0 if np.isnan(w[row, at]) else w[row, at]
                    support[vote] = support.get(vote, 0.0) + own
            best = max(support, key=lambda v: (support[v], -list(votes).index(v))) if support else votes[0]
            assert pick.sample[row] == list(votes).index(best)
            assert pick.correct[row] == samples.correct[row, pick.sample[row]]
        assert (pick.tokens == samples.tokens.sum(1)).all()
        assert (pick.drawn == 5).all()


def test_of_equals_the_first_and_a_chain_without_the_signal_last():
    signals = {"s": np.array([[1.0, 2.0, 2.0], [np.nan, -5.0, np.nan], [np.nan] * 3, [np.nan, -np.inf, 3.0]])}
    samples = Samples(np.array([[0, 1, 1]] * 4), np.array([[True, False, False]] * 4), np.full((4, 3), 10), signals)
    assert best_of(samples, "s").sample.tolist() == [1, 1, 0, 2]
    pick = accept_early(samples, "s", 2.0)
    assert pick.sample.tolist() == [1, 1, 1, 2], "where none passes, all vote"
    assert pick.drawn.tolist() == [2, 3, 3, 3]
    assert pick.tokens.tolist() == [20, 30, 30, 30]
    assert accept_early(samples, "s", math.inf).drawn.tolist() == [3] * 4
    assert accept_early(samples, "s", -math.inf).sample[0] == 0
    none = Samples(np.full((1, 3), -1), np.zeros((1, 3), dtype=bool), np.full((1, 3), 10), {})
    assert majority(none).correct.tolist() == [False]


def published(samples, by):
    """The authors' rule, written from its description: loops and lists."""
    values = [
        (v, c)
        for row, own in zip(samples.signal(by), samples.correct, strict=True)
        for v, c in zip(row, own, strict=True)
    ]
    values = [(v, c) for v, c in values if not np.isnan(v)]
    wrong = sorted(v for v, c in values if not c)
    if len(wrong) < 15:
        return float(np.median([v for v, _ in values])) if values else math.inf
    scored = []
    for percent in range(20, 100):
        place = percent / 100 * (len(wrong) - 1)
        low = int(place + 1e-9)
        by_hand = wrong[low] + (place - low) * (wrong[min(low + 1, len(wrong) - 1)] - wrong[low])
        tau = np.quantile(wrong, np.arange(0.2, 1, 0.01)[percent - 20])  # to the bit: at a sample it decides
        assert tau == pytest.approx(by_hand, rel=1e-9)
        right = 0
        for row, votes in enumerate(samples.votes):
            first = next((i for i, v in enumerate(samples.signal(by)[row]) if not np.isnan(v) and v >= tau), None)
            if first is None:
                counts = {v: list(votes).count(v) for v in votes if v != -1}
                first = (
                    list(votes).index(max(counts, key=lambda v: (counts[v], -list(votes).index(v)))) if counts else 0
                )
            right += samples.correct[row, first]
        scored.append((-right, percent, tau))
    return float(np.median([tau for *_, tau in sorted(scored)[:2]]))


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_published_rules(seed):
    samples = noisy(seed, n=40)
    for name in ("a", "b"):
        assert acceptance_threshold(samples, name) == pytest.approx(published(samples, name), rel=1e-6)
        few = samples.only(np.arange(40) < 3)
        assert acceptance_threshold(few, name) == pytest.approx(published(few, name), rel=1e-6)
    bare = samples.with_signal("none", np.full(samples.votes.shape, np.nan))
    assert acceptance_threshold(bare, "none") == math.inf


def test_an_early_path_costs_what_was_written():
    tokens = np.array([[100, 30, 250, 60], [10, 20, 30, 40]])
    signals = {"s": np.array([[1.0, np.nan, 3.0, 2.0], [np.nan, np.nan, np.nan, np.nan]])}
    samples = Samples(np.zeros((2, 4), dtype=int), np.array([[False, False, True, False]] * 2), tokens, signals)
    pick = early_path(samples, "s", 50)
    assert pick.sample.tolist() == [2, 0]
    assert pick.tokens.tolist() == [50 + 30 + 250 + 50, 10 + 20 + 30 + 40]
    assert early_path(samples, "s", 0).tokens.tolist() == [250, 10]
    assert early_path(samples, "s", 10_000).tokens.tolist() == [440, 100]
    assert pick.correct.tolist() == [True, False]


@pytest.mark.filterwarnings("error")
def test_signals_are_combined_by_what_they_were_in_training():
    train, test = noisy(0), noisy(1)
    found = combined(train, ["a", "b"])(test)
    parts, weights = [], []
    for name in ("a", "b"):
        values, known = train.signal(name), ~np.isnan(train.signal(name))
        mean, deviation = values[known].mean(), values[known].std()
        z = np.where(known, (values - mean) / deviation, 0.0)
        weights.append(abs(np.corrcoef(z.ravel(), train.correct.ravel())[0, 1]))
        own = test.signal(name)
        parts.append(np.where(np.isnan(own), 0.0, (own - mean) / deviation))
    wanted = sum(w * part for w, part in zip(np.array(weights) / sum(weights), parts, strict=True))
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    bare = train.with_signal("none", np.full(train.votes.shape, np.nan)).with_signal("flat", np.ones(train.votes.shape))
    assert np.isfinite(combined(bare, ["a", "none", "flat"])(bare)).all()
    np.testing.assert_allclose(combined(bare, ["a", "none", "flat"])(bare), combined(train, ["a"])(train), atol=1e-12)
    assert (combined(bare, ["none"])(bare) == 0).all()


def test_what_is_fitted_never_sees_the_labels_of_what_it_picks():
    train, test = noisy(0), noisy(1)
    turned = replace(test, correct=~test.correct)
    assert (combined(train, ["a", "b"])(test) == combined(train, ["a", "b"])(turned)).all()
    assert (chances(train, "a")(test) == chances(train, "a")(turned)).all()
    other = replace(train, correct=~train.correct)
    assert not np.allclose(chances(train, "a")(test), chances(other, "a")(test))


def test_chances_are_chances():
    """Of labels drawn by a logistic law, the law."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 3))
    law = 1 / (1 + np.exp(-(0.3 + 1.2 * x)))
    ones = np.ones(x.shape, dtype=int)
    samples = Samples(ones, rng.random(x.shape) < law, ones, {"s": x})
    found = chances(samples, "s")(samples)
    assert np.abs(found - law).max() < 0.03
    gap = np.where(rng.random(x.shape) < 0.2, np.nan, x)
    known = chances(samples.with_signal("s", gap), "s")(samples.with_signal("s", gap))
    assert (known[np.isnan(gap)] == samples.correct.mean()).all()
    sure = replace(samples, correct=np.ones(x.shape, dtype=bool))
    assert (chances(sure, "s")(samples) == 1.0).all()


def test_every_problem_is_picked_once_by_a_rule_that_never_saw_it():
    samples = noisy(2, n=23)
    ids = np.arange(23.0)[:, None] + np.zeros((23, 5))
    samples, seen = samples.with_signal("id", ids), []

    def rule(train, test):
        inside, outside = (set(part.signal("id")[:, 0].astype(int)) for part in (train, test))
        assert not inside & outside
        assert inside | outside == set(range(23))
        seen.extend(outside)
        return replace(best_of(test, "a"), tokens=test.signal("id")[:, 0].astype(int))

    pick = cross_validated(samples, rule, folds=4)
    assert sorted(seen) == list(range(23))
    assert pick.tokens.tolist() == list(range(23)), "each in its place"
    plain = best_of(samples, "a")
    assert (pick.sample == plain.sample).all()
    assert (pick.correct == plain.correct).all()
    assert (pick.drawn == plain.drawn).all()
    for folds in (1, 24):
        with pytest.raises(ValueError, match=rf"^{folds} folds of 23 problems cannot be made: give 2 or more, and as"):
            cross_validated(samples, rule, folds=folds)


def test_the_standard_picks_of_a_fold_do_not_know_its_labels():
    """Labels of one fold turned: what is picked within it stays as it was."""
    samples = noisy(3, n=40)
    fold = np.random.default_rng(0).permutation(40) % 5
    turned = np.where((fold == 2)[:, None], ~samples.correct, samples.correct)
    before, after = standard_picks(samples), standard_picks(replace(samples, correct=turned))
    assert list(before) == [
        "first sample", "majority", "best by a", "vote by a", "first past a", "best by b", "vote by b", "first past b",
    ]  # fmt: skip
    for name, pick in before.items():
        assert (pick.sample[fold == 2] == after[name].sample[fold == 2]).all(), name
        assert (pick.tokens[fold == 2] == after[name].tokens[fold == 2]).all(), name
    assert any((pick.sample != after[name].sample).any() for name, pick in before.items())


def test_majority_at_equal_tokens_is_between_two_numbers_of_samples():
    votes = np.array([[0, 1, 1], [0, 0, 1], [1, 0, 0], [0, 1, 0]])
    samples = Samples(votes, votes == 0, np.full((4, 3), 10), {})
    right = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 1], [1, 1, 1]])  # of majority of 1, 2, 3
    for spent, wanted in ((10, 0), (20, 1), (30, 2), (15, 0.5), (27, 1.7), (5, 0), (99, 2)):
        low, share = int(wanted), wanted - int(wanted)
        equal = (1 - share) * right[:, low] + share * right[:, min(low + 1, 2)]
        own = np.array([True, False, True, True])
        pick = Pick(np.zeros(4, dtype=int), own, np.full(4, 2.0), np.full(4, spent))
        score = pick_table(samples, {"x": pick})["x"]
        assert score.at_equal_tokens == pytest.approx((own - equal).mean())
        assert score.over_majority == pytest.approx((own - right[:, 2]).mean())
        assert (score.n, score.drawn, score.tokens, score.accuracy) == (4, 2.0, spent, 0.75)
        assert score.interval[0] <= 0.75 <= score.interval[1]
    same = pick_table(samples, {"vote": majority(samples), "two": majority(samples.first(2))})
    for name in ("vote", "two"):
        assert same[name].at_equal_tokens == pytest.approx(0)
        assert same[name].at_equal_tokens_interval == pytest.approx((0, 0))
    assert [row[0] for row in same.table().rows] == ["vote", "two"]
    with pytest.raises(KeyError, match=r"'three' is none of these rules\. Known: vote, two\."):
        same["three"]


def test_samples_are_completions_in_their_order_graded_by_their_task():
    model, task = load("organism"), task_named("chains")
    problems = task.sample(4, "select")
    sampling = Sampling(temperature=1.5, top_p=1.0, max_new_tokens=30)
    made = generate(
        model, [p.question for p in problems], ids=[p.id for p in problems], samples=3, sampling=sampling
    )  # fmt: skip
    order = np.random.default_rng(0).permutation(12)
    mixed = [made[i] for i in order]
    samples = Samples.of(mixed, problems, task, {"n": [float(len(c.ids)) for c in mixed]})
    assert samples.signal("n").tolist() == samples.tokens.tolist() == [
        [len(made[3 * row + k].ids) for k in range(3)] for row in range(4)
    ]  # fmt: skip
    for row, k, j in product(range(4), range(3), range(3)):
        same = made[3 * row + k].answer == made[3 * row + j].answer
        if same:
            assert samples.votes[row, k] == samples.votes[row, j]
        if samples.votes[row, k] == samples.votes[row, j] != -1:
            assert samples.correct[row, k] == samples.correct[row, j]
    assert 0 < samples.correct.sum() < 12
    first = samples.first(2)
    assert first.votes.tolist() == samples.votes[:, :2].tolist()
    assert first.signal("n").shape == (4, 2)
    some = samples.only(np.array([False, True, False, True]))
    assert some.tokens.tolist() == samples.tokens[[1, 3]].tolist()


def test_what_cannot_be_chosen_by_is_refused():
    samples = binary(3, 2, 0.5)
    with pytest.raises(ValueError, match=r"^'luck' is none of these signals\. Known: perfect\.$"):
        best_of(samples, "luck")
    for k in (0, 3):
        with pytest.raises(ValueError, match=rf"^{k} samples of each problem are asked for, of 2\.$"):
            samples.first(k)
    model, task = load("organism"), task_named("chains")
    problems = task.sample(2, "select")
    made = generate(
        model, [p.question for p in problems], ids=[p.id for p in problems], samples=2,
        sampling=Sampling(max_new_tokens=3),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^Problems have 1 to 2 samples: give as many each\.$"):
        Samples.of(made[:-1], problems, task)
    with pytest.raises(ValueError, match=r"^The signal 's' has not one number for each of 4 completions\.$"):
        Samples.of(made, problems, task, {"s": [1.0]})
