"""Association scores against counts made token by token, with planted truths and chance."""

import math

import numpy as np
import pytest
import torch

from probes.activations.experts import ExpertReading
from probes.evidence.association import associate, mutual_information, npmi, risk_difference


def random_tokens(seed, n_tokens=400, n_experts=6, k=2, p_marker=0.2):
    """For each token: is it the marker, and which experts it chose."""
    rng = np.random.default_rng(seed)
    markers = rng.random(n_tokens) < p_marker
    routed = [set(row) for row in rng.random((n_tokens, n_experts)).argsort(1)[:, :k].tolist()]
    return markers, routed


def reading_of(completions, n_experts=6, layers=(3,)):
    """A reading with one marker `x`, from lists of (is the marker, experts) token by token."""
    counts = torch.zeros(len(completions), 2, 1, n_experts, dtype=torch.int32)
    tokens = torch.zeros(len(completions), 2, dtype=torch.int32)
    for i, (markers, routed) in enumerate(completions):
        held = np.zeros((len(routed), n_experts), np.int32)
        for at, experts in enumerate(routed):
            held[at, list(experts)] = 1
        for kind, which in enumerate((slice(None), np.asarray(markers))):
            counts[i, kind, 0] = torch.from_numpy(held[which].sum(0))
            tokens[i, kind] = len(held[which])
    return ExpertReading(layers, ("all", "x"), counts, tokens, ("y",))


def brute_force(markers, routed, expert):
    """nPMI, risk difference and mutual information from the definition, over tokens."""
    n, has = len(markers), [expert in some for some in routed]
    joint = sum(m and h for m, h in zip(markers, has, strict=True)) / n
    p_x, p_y = sum(markers) / n, sum(has) / n
    pmi = math.log2(joint / (p_x * p_y)) if joint else None
    information = 0.0
    for marker in (True, False):
        for own in (True, False):
            p = sum(m == marker and h == own for m, h in zip(markers, has, strict=True)) / n
            if p:
                information += p * math.log2(p / ((p_x if marker else 1 - p_x) * (p_y if own else 1 - p_y)))
    at = [h for m, h in zip(markers, has, strict=True) if m]
    elsewhere = [h for m, h in zip(markers, has, strict=True) if not m]
    difference = sum(at) / len(at) - sum(elsewhere) / len(elsewhere)
    return (-1.0 if pmi is None else pmi / -math.log2(joint)), difference, information


@pytest.mark.parametrize("seed", range(5))
def test_the_measures_are_those_of_the_definition(seed):
    markers, routed = random_tokens(seed)
    reading = reading_of([(markers, routed)])
    (whole, at), (n, m) = reading.counts[0, :, 0].double().numpy(), reading.tokens[0].double().numpy()
    for expert in range(6):
        wanted = brute_force(markers, routed, expert)
        found = [measure(at[expert], whole[expert], m, n) for measure in (npmi, risk_difference, mutual_information)]
        np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_chance_is_zero_and_perfect_association_one():
    assert npmi(20, 200, 10 * 10, 1000) == pytest.approx(0, abs=1e-12)
    assert npmi(30, 30, 30, 1000) == pytest.approx(1, abs=1e-12)
    assert npmi(0, 30, 30, 1000) == -1
    assert npmi(10, 10, 10, 10) == 1  # every token is the marker
    assert mutual_information(20, 200, 100, 1000) == pytest.approx(0, abs=1e-12)
    assert risk_difference(100, 200, 100, 1000) == pytest.approx(1 - 100 / 900)


def test_npmi_never_leaves_its_bounds():
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 2000, 20_000)
    markers, routed = (rng.integers(1, tokens + 1) for _ in range(2))
    least, most = np.maximum(0, markers + routed - tokens), np.minimum(markers, routed)
    k = rng.integers(least, most + 1)
    value = npmi(k, routed, markers, tokens)
    assert np.isfinite(value).all()
    assert (np.abs(value) <= 1).all()


def planted(seed, completions=40, strength=0.8):
    """Completions in which expert 4 is chosen at the marker with a probability, and at random elsewhere."""
    rng, found = np.random.default_rng(seed), []
    for i in range(completions):
        markers, routed = random_tokens(1000 * seed + i, n_tokens=30, p_marker=0.1)
        for at in np.flatnonzero(markers):
            if rng.random() < strength:
                routed[at] = {4, int(rng.choice([e for e in range(6) if e != 4]))}
        found.append((markers, routed))
    return found


def test_a_planted_expert_is_first_with_its_interval_and_the_others_hold_nothing():
    a = associate(reading_of(planted(1)), {"x": 1.0})
    assert a.top(1) == [(3, 4)]
    others = [e for e in range(6) if e != 4]
    assert a.low[0, 4] > a.high[0, others].max()
    assert a.q[0, 4] < 1e-6
    assert a.table(2).rows[0][1] == "L3E4"
    assert list(a.to_frame()["expert"])[0] == "L3E4"
    assert associate(reading_of(planted(1)), {"x": -1.0}).bottom(1) == [(3, 4)]


def with_another_marker(completions, seed):
    """The same tokens with a second marker `y` at random places."""
    rng = np.random.default_rng(seed)
    others = [(rng.random(len(markers)) < 0.1, routed) for markers, routed in completions]
    first, second = reading_of(completions), reading_of(others)
    counts, tokens = (
        torch.cat([a, b[:, 1:]], 1) for a, b in ((first.counts, second.counts), (first.tokens, second.tokens))
    )
    return ExpertReading(first.layers, ("all", "x", "y"), counts, tokens)


@pytest.mark.parametrize("signs", [{"x": 1.0}, {"x": 1.0, "y": -1.0}], ids=["one marker", "two"])
def test_without_an_effect_false_discoveries_are_rare_and_intervals_cover_zero(signs):
    """200 null data sets of six experts, at a rate of 5 %: at most 8 % by chance in 98 of 100 draws of 200."""
    data = (with_another_marker(planted(seed, strength=0.0), seed) for seed in range(200))
    found = [associate(reading, signs, draws=200) for reading in data]
    rate = sum((a.q < 0.05).any() for a in found) / len(found)
    assert 0 < rate <= 0.08
    covered = np.mean([((a.low <= 0) & (a.high >= 0)).mean() for a in found])
    assert 0.9 < covered < 0.99


def test_ties_rare_experts_and_lacking_markers_are_told():
    markers, routed = [True, False, False, False] * 10, [{0, 1}, {2}, {3}, {2, 3}] * 10
    routed[1] = {2, 5}
    a = associate(reading_of([(markers, routed)] * 4), {"x": 1.0, "y": -1.0}, minimum=8)
    assert a.left_out == ("y",)
    assert "left out: y" in a.table().title
    assert np.isnan(a.score[0, 5])  # chosen four times
    assert (3, 5) not in a.top(10)
    ties = {row[1]: row[5] for row in a.table().rows}
    assert ties == {"L3E0": 1, "L3E1": 1, "L3E2": 1, "L3E3": 1}


def test_a_matched_control_has_a_like_load_and_no_member_of_the_chosen():
    a = associate(reading_of(planted(2)), {"x": 1.0})
    for seed in range(10):
        found = a.matched([(3, 4), (3, 0)], seed=seed, near=2)
        assert not set(found) & {(3, 4), (3, 0)}
        assert len(set(found)) == 2
        for own, other in zip([4, 0], found, strict=True):
            gaps = sorted(abs(a.load[0, e] - a.load[0, own]) for e in range(6) if e not in (4, 0))
            assert abs(a.load[0, other[1]] - a.load[0, own]) <= gaps[2]
    assert all(len(set(a.matched([(3, 4), (3, 0)], seed=seed))) == 2 for seed in range(40))
    assert len({tuple(a.matched([(3, 4)], seed=seed)) for seed in range(10)}) > 1
    with pytest.raises(ValueError, match="All 6 scored experts are taken"):
        a.matched([(3, e) for e in range(6)], seed=0)


@pytest.mark.parametrize(
    ("signs", "minimum", "sentence"),
    [
        ({"z": 1.0}, 10, "'z' was not read with these completions. Read: all, x, y"),
        ({"y": 1.0}, 10, "None of y occurs in the completions"),
        ({"x": 1.0}, 10**6, "No expert is chosen 1000000 times"),
    ],
)
def test_what_cannot_be_scored_is_refused(signs, minimum, sentence):
    with pytest.raises(ValueError, match=sentence):
        associate(reading_of(planted(1)), signs, minimum=minimum)
