"""A strength given by its effect has that effect."""

import pytest
import torch
from families import build

from probes import load
from probes.directions.direction import direction_between
from probes.model.sites import Site
from probes.thinking.spans import Span
from steer.interventions.activation import Ablate, Add
from steer.recipes.recipe import Recipe
from steer.recipes.scope import Scope
from steer.runtime._applied import NeverFired, applied
from steer.runtime.calibration import calibrated, divergence, with_ratio
from steer.runtime.effects import prompt_spans

ROWS = [[1, 7, 8, 5], [1, 9, 5, 3, 11], [1, 12, 13, 14, 15, 5, 3, 8, 4]]
SPANS = [Span(tuple(row), len(row) - n, len(row)) for n, row in zip((1, 2, 4), ROWS, strict=True)]


def random_vector(seed=2):
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


def by_formula(model, recipe):
    """KL in float64, row by row, without pads."""
    total = 0.0
    for span in SPANS:
        ids = torch.tensor([span.ids])
        with torch.no_grad():
            plain = model(ids).logits[0, span.start :].double().softmax(-1)
            with applied(model, recipe):
                steered = model(ids).logits[0, span.start :].double().softmax(-1)
        total += float((plain * (plain.log() - steered.log())).sum(-1).mean())
    return total / len(SPANS)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_the_target_is_met_by_the_formula_too(family):
    model = build(family)
    recipe = Recipe.of(model, [Add(Site(1, "resid_post"), random_vector()), Add(Site(2, "mlp_out"), random_vector(3))])
    for kl in (0.005, 0.02):
        found = calibrated(model, recipe, SPANS, kl)
        assert by_formula(model, found) == pytest.approx(kl, rel=0.1)
        assert by_formula(model, found) == pytest.approx(divergence(model, found, SPANS, batch_size=2), rel=1e-3)
        a, b = (step.intervention.strength for step in found.steps)
        assert a == b


def test_what_cannot_be_reached_is_said():
    model = build("llama")
    late = Recipe.of(model, [Add(Site(1, "resid_post"), random_vector())], scope=Scope("answer"))
    with pytest.raises(ValueError, match="No strength up to .* moves the next token by 0.05 nats .* scope reach"):
        calibrated(model, late, [Span((1, 7, 8, 5), 3, 4)])
    with pytest.raises(ValueError, match="A target divergence is a finite number of nats above 0, but got -1"):
        calibrated(model, late, SPANS, -1)
    with pytest.raises(ValueError, match="A divergence is measured on prompts, but none was given."):
        divergence(model, late, [])
    with pytest.raises(NeverFired):
        with_ratio(model, late, [Span((1, 7, 8, 5), 3, 4)], 0.1)
    ablation = Recipe.of(model, [Ablate(Site(1, "resid_post"), random_vector())])
    with pytest.raises(ValueError, match="A ratio sets the strength of Adds; step 0 is a ablate."):
        with_ratio(model, ablation, SPANS, 0.1)


def test_the_same_ratio_is_as_strong_on_any_layer_on_other_prompts_too():
    """The organism's norms grow with depth, and differ tenfold between tokens."""
    model = load("organism")
    words = ("a 3 b +4 c *7", "a 1 b -2 c +5 d *3", "a 9 b +1 c -7 d +2 quick", "a 2 b *9 c +3")
    ratios, strengths = [], []
    for layer in (0, 3):
        direction = direction_between(model, words[:2], words[2:], Site(layer, "resid_post"))
        recipe = Recipe.of(model, [Add.of(direction, 1.0)])
        found = with_ratio(model, recipe, prompt_spans(model, words[:2]), 0.1)
        with torch.no_grad(), applied(model, found) as fired:
            for span in prompt_spans(model, words[2:]):
                model(torch.tensor([span.ids]))
        ratios.append(fired.mean_ratio())
        strengths.append(found.steps[0].intervention.strength)
    assert ratios[0] == pytest.approx(ratios[1], rel=0.05)
    assert ratios == pytest.approx([0.1, 0.1], rel=0.1)
    assert strengths[0] != pytest.approx(strengths[1], rel=0.05)


def test_units_of_the_stream_are_its_mean_norm():
    model = load("organism")
    direction = direction_between(model, ["a 3 b +4"], ["a 5 b -1 quick"], "L2.resid_post")
    added = Add.of(direction, 0.5)
    assert float(added.strength * added.vector.norm()) == pytest.approx(0.5 * direction.stream_norm, rel=1e-5)
    assert torch.equal(Add.of(direction, 0.5, units="raw").vector, direction.vector)


@pytest.mark.parametrize("strength", [float("inf"), float("nan")])
def test_a_strength_or_a_vector_that_is_no_number_is_refused(strength):
    with pytest.raises(ValueError, match=f"The add at L1.resid_post has strength {strength}. Give a finite number."):
        Add(Site(1, "resid_post"), random_vector(), strength)
    vector = random_vector()
    vector[3] = strength
    with pytest.raises(ValueError, match="The vector for L1.resid_post holds NaN or infinite entries. Derive it again"):
        Ablate(Site(1, "resid_post"), vector)
