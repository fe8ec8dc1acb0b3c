"""Evidence finds what was planted, finds nothing in shuffled labels, and names a confound as one."""

import pytest
import torch
from families import build
from scipy.stats import binom

from probes.evidence._separation import auroc, evidence_for, evidence_of, halves_of
from probes.model.sites import Site
from probes.thinking.spans import Span

SITE, D = Site(0, "resid_mid"), 12


def spans(n, length, seed):
    rng = torch.Generator().manual_seed(seed)
    return [
        Span(tuple(torch.randint(6, 97, (length + i % 4,), generator=rng).tolist()), i % 3, length) for i in range(n)
    ]


def noise(n, seed):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def labels(n):
    return torch.arange(n) % 2 == 0


def judge(means, marks, confounds=None, **how):
    return evidence_of(means, marks, confounds or {}, halves_of(marks), SITE, **how)


def test_a_planted_direction_is_found_with_its_interval():
    """Classes 3 standard deviations apart along one axis: AUROC is Φ(3/√2) = .983, and the halves agree."""
    marks, planted = labels(400), torch.zeros(D)
    planted[3] = 3.0
    found = judge(noise(400, 0) + marks[:, None] * planted, marks)
    assert found.auroc == pytest.approx(0.983, abs=0.03)
    assert found.p == 1 / 201
    assert found.null[0] < 0.5 < found.null[1] < found.auroc
    assert found.random[0] < 0.5 < found.random[1]
    # a half's v² is 9 plus noise D (1/100 + 1/100) = 0.24, twice that when resampled: cosines about 9/9.48 = .95
    assert found.cosine[0] > 0.85
    assert found.cosine[1] <= 1.0


def test_shuffled_labels_are_found_as_often_as_the_level_says():
    """500 simulations of pure noise: at most 7 % have p <= .05; 25 are expected, and 36 are past the .98 quantile."""
    hits = 0
    for seed in range(500):
        hits += judge(noise(40, seed), labels(40), seed=seed, n_permutations=99, n_bootstrap=2).p <= 0.05
    assert binom.ppf(0.0001, 500, 0.05) <= hits <= 0.07 * 500


@pytest.mark.parametrize("honest", [False, True])
def test_a_planted_length_confound_is_reported_as_one(honest):
    """The activation is the length and nothing else, or a direction that length says nothing of."""
    marks, rng = labels(300), torch.Generator().manual_seed(1)
    length = torch.randn(300, generator=rng) + (0 if honest else 3) * marks
    carried = marks.float() * 3 if honest else length
    means = noise(300, 2) * 0.3
    means[:, 5] += carried
    found = judge(means, marks, {"length": length})
    assert found.auroc > 0.95
    assert found.confounded is not honest
    assert (found.beyond > 0.95) == honest
    assert (abs(found.confounds["length"] - 0.5) < 0.15) == honest


def test_swapping_the_classes_changes_nothing_but_the_sign():
    marks = labels(60)
    means = noise(60, 4) + marks[:, None] * 0.5
    there, back = judge(means, marks), judge(means, ~marks)
    assert there.confounds == back.confounds
    halves = halves_of(marks)
    one, other = (evidence_of(means, m, {}, halves, SITE) for m in (marks, ~marks))
    assert one.auroc == pytest.approx(other.auroc)


def test_the_held_out_half_never_derives():
    """The direction comes from one half: changing the other's labels moves what is measured, not what is derived."""
    marks = labels(80)
    means, halves = noise(80, 5), halves_of(labels(80))
    assert int(halves.sum()) == 40
    assert int((halves & marks).sum()) == 20
    direction = means[halves & marks].double().mean(0) - means[halves & ~marks].double().mean(0)
    projected = means[~halves].double() @ direction
    expected = auroc(projected[marks[~halves]], projected[~marks[~halves]])
    assert judge(means, marks).auroc == pytest.approx(expected)


def test_of_a_model_it_is_that_of_its_activations():
    model = build("llama")
    positive, negative = spans(12, 5, 0), spans(10, 9, 1)
    found = evidence_for(model, positive, negative, site="resid_post", n_permutations=20, n_bootstrap=20)
    assert [e.site for e in found.layers] == [Site(layer, "resid_post") for layer in range(3)]
    again = evidence_for(model, positive, negative, site="resid_post", n_permutations=20, n_bootstrap=20)
    assert again == found
    assert found.best().auroc == max(e.auroc for e in found.layers)
    assert found.to_frame()["AUROC"].tolist() == [e.auroc for e in found.layers]
    assert set(found.layers[0].confounds) == {"prompt length", "span length", "mean position"}
    assert found.layers[0].confounds["span length"] < 0.1  # the positive are the short ones
    with pytest.raises(ValueError, match="Evidence needs 4 spans of each class, but got 3 positive and 10 negative"):
        evidence_for(model, positive[:3], negative)
