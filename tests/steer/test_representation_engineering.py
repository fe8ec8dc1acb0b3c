"""Representation Engineering, against its formulas written straight down in float64, row by row, without pads."""

import math

import pytest
import torch
from families import build

from probes.directions.paired import contrast_vectors
from probes.model.hooks import attached, captured
from probes.model.sites import Site
from probes.thinking.spans import Span
from steer.methods import representation_engineering
from steer.runtime.effects import Choice, effect_curve

POSITIVE = ("w7 w8 w9", "w10 w11", "w12 w13 w14 w15", "w16", "w20 w21 w22")
NEGATIVE = ("w7 w8 w30", "w10 w31 w32", "w12 w13 w14 w33", "w34 w35", "w20 w21 w36")


@pytest.fixture(scope="module")
def model():
    return build("llama").double()


def ids_of(text):
    return [int(word[1:]) for word in text.split()]


def last_states(model, texts, layer):
    rows = []
    for text in texts:
        with torch.no_grad(), captured(model, [Site(layer, "resid_post")]) as cache:
            model(torch.tensor([ids_of(text)]))
        rows.append(cache[Site(layer, "resid_post")][0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_three_vectors_are_those_of_the_formulas(model, layer):
    above, below = (last_states(model, texts, layer) for texts in (POSITIVE, NEGATIVE))
    differences = above - below
    mean = differences.mean(0)
    expected = {"reading": above.mean(0), "contrast": mean}
    for name, rows in (("pca", differences - mean), ("pca uncentred", differences)):
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        unit = vectors[:, -1]
        expected[name] = unit * (1 if unit @ mean > 0 else -1) * mean.norm()
    for estimator, vector in expected.items():
        texts = (POSITIVE, ()) if estimator == "reading" else (POSITIVE, NEGATIVE)
        ours = representation_engineering.directions(model, *texts, estimator=estimator)[layer]
        torch.testing.assert_close(ours.vector.double(), vector, atol=1e-6, rtol=1e-6)
        assert ours.site == Site(layer, "resid_post")
    norms = torch.cat([above, below]).norm(dim=1)
    assert representation_engineering.directions(model, POSITIVE, NEGATIVE)[layer].stream_norm == pytest.approx(
        float(norms.mean()), rel=1e-6
    )


@pytest.mark.parametrize("normalise", [False, True])
def test_divergence_entropy_and_answer_mass_are_those_of_the_formulas_in_padded_batches(model, normalise):
    vector = representation_engineering.directions(model, POSITIVE, NEGATIVE)[1]
    rows = [ids_of(text) for text in (*POSITIVE, *NEGATIVE)]
    choices = [Choice(Span(tuple(row), len(row) - 1, len(row)), (6 + i, 40, 50), i % 3) for i, row in enumerate(rows)]
    strengths = (-1.0, 0.0, 2.5)
    curve = effect_curve(
        model,
        lambda s: representation_engineering.recipe(model, vector, s, normalise=normalise),
        choices,
        strengths,
        batch_size=4,
    )
    for strength, effect in zip(strengths, curve.effects, strict=True):

        def steered(y, strength=strength):
            new = y + strength * vector.vector.double()
            return new * y.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True) if normalise else new

        kl, entropy, mass, hits = [], [], [], []
        for row, choice in zip(rows, choices, strict=True):
            with torch.no_grad():
                p = model(torch.tensor([row])).logits[0, -1].softmax(-1)
                with attached(model, vector.site, steered):
                    logits = model(torch.tensor([row])).logits[0, -1]
            q = logits.softmax(-1)
            kl.append(sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True)))
            entropy.append(-sum(float(b) * math.log2(float(b)) for b in q))
            candidates = [float(q[token]) for token in choice.candidates]
            mass.append(candidates[choice.correct] / sum(candidates))
            hits.append(max(candidates) == candidates[choice.correct])
        for ours, values in ((effect.kl, kl), (effect.entropy, entropy)):
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / len(values)
            assert ours == pytest.approx((mean, variance), abs=1e-6)
        assert effect.mass == pytest.approx(sum(mass) / len(mass), abs=1e-6)
        assert effect.accuracy == sum(hits) / len(hits)
    assert curve.effects[1].kl == (0, 0)
    assert len(curve.to_frame()) == 3


def test_what_makes_no_pairs_is_refused(model):
    spans = [Span((7, 8), 1, 2), Span((9,), 0, 1)]
    sites = [Site(0, "resid_post")]
    with pytest.raises(ValueError, match="'pca' needs pairs, but got 2 positive and 1 negative."):
        contrast_vectors(model, spans, spans[:1], sites, estimator="pca")
    with pytest.raises(ValueError, match="A reading vector has one class: leave the negative one empty."):
        contrast_vectors(model, spans, spans, sites, estimator="reading")
    with pytest.raises(ValueError, match="needs pairs, but got 0 positive"):
        contrast_vectors(model, [], [], sites)
    vector = representation_engineering.directions(model, POSITIVE, NEGATIVE)[1]
    for choices, sentence in (
        ([], "A curve is measured on prompts, but none was given."),
        ([Choice(spans[0], (7, 7), 0)], "Two candidate answers of prompt 0 begin with one token"),
    ):
        with pytest.raises(ValueError, match=sentence):
            effect_curve(model, lambda s: representation_engineering.recipe(model, vector, s), choices, [0.0])
