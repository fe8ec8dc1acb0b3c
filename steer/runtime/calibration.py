"""Strength by its effect: how far a recipe moves the next token, and the strength that moves it so far."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from probes.late import optimize
from probes.model.positions import rope_groups
from probes.thinking.spans import Span
from steer.interventions.activation import Add, with_fields
from steer.interventions.routing import Forbid, Force
from steer.recipes.recipe import Recipe, Step
from steer.runtime._applied import applied
from steer.runtime.effects import log_probabilities
from steer.runtime.firelog import FireLog

LARGEST_FACTOR = 2.0**20


def divergence(model: PreTrainedModel, recipe: Recipe, spans: Sequence[Span], *, batch_size: int = 16) -> float:
    """Mean over spans of the mean over their positions of KL(plain ‖ steered) of the next token, in nats.

    Raises ValueError where there are no spans.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, Recipe
    >>> from steer.runtime import divergence, prompt_spans
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Add(Site(3, "resid_post"), torch.arange(96.0), 0.5)])
    >>> round(divergence(model, recipe, prompt_spans(model, ["a 3 b +4 c *7"])), 2)
    0.09
    """
    if not spans:
        raise ValueError("A divergence is measured on prompts, but none was given.")
    order = sorted(spans, key=lambda span: span.stop)
    groups = rope_groups(model, [len(span.ids) for span in order])
    total = 0.0
    for rows in (group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)):
        batch = [order[i] for i in rows]
        plain, steered = (log_probabilities(model, batch, which) for which in (None, recipe))
        kl = (plain.exp() * (plain - steered)).sum(-1)
        width = kl.shape[1]
        for row, span in zip(kl, batch, strict=True):
            total += float(row[width - (span.stop - span.start) :].mean())
    return total / len(spans)


def calibrated(model: PreTrainedModel, recipe: Recipe, spans: Sequence[Span], kl: float = 0.05) -> Recipe:
    """The recipe with all its strengths multiplied by one factor, such that `divergence` on `spans` is `kl` nats.

    The first crossing, searched by doubling from a small factor on. Raises ValueError where no factor reaches it to
    10 %: a sparse model's divergence may jump, where a prompt's experts change.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, Recipe
    >>> from steer.runtime import calibrated, divergence, prompt_spans
    >>> model = load("organism")
    >>> spans = prompt_spans(model, ["a 3 b +4 c *7"])
    >>> recipe = calibrated(model, Recipe.of(model, [Add(Site(3, "resid_post"), torch.arange(96.0))]), spans, kl=0.05)
    >>> round(divergence(model, recipe, spans), 2)
    0.05
    """
    if not 0 < kl < math.inf:
        raise ValueError(f"A target divergence is a finite number of nats above 0, but got {kl}.")

    def excess(log_factor: float) -> float:
        return math.log(max(divergence(model, scaled(recipe, math.exp(log_factor)), spans), 1e-12) / kl)

    low, high = math.log(2.0**-6), math.log(2.0**-5)
    while excess(low) > 0:
        low, high = low - math.log(2), low
    while excess(high) < 0:
        low, high = high, high + math.log(2)
        if math.exp(high) > LARGEST_FACTOR:
            raise ValueError(
                f"No strength up to {LARGEST_FACTOR:g} times the recipe's moves the next token by {kl} nats on these "
                "prompts. Does its scope reach the positions that are read?"
            )
    result = scaled(recipe, math.exp(optimize.brentq(excess, low, high, xtol=1e-3)))
    reached = divergence(model, result, spans)
    if not 0.9 < reached / kl < 1.1:
        raise ValueError(
            f"The divergence on these {len(spans)} prompts jumps past {kl} nats, to {reached:.3g}, at strength "
            f"{result.steps[0].intervention.strength:.3g}. Give more prompts, or another target."
        )
    return result


def with_ratio(model: PreTrainedModel, recipe: Recipe, spans: Sequence[Span], ratio: float) -> Recipe:
    """The recipe with each step's strength such that its mean ‖Δ‖/‖x‖ over the tokens it touches in `spans` is `ratio`.

    For Adds, whose Δ grows with the strength: a token's own norm is the unit, so that the same ratio is as strong on
    any layer. Measured on the model as it runs without the recipe. Raises ValueError where a step touches nothing, or
    is no Add.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, Recipe
    >>> from steer.runtime import prompt_spans, with_ratio
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Add(Site(2, "resid_post"), torch.ones(96))])
    >>> round(with_ratio(model, recipe, prompt_spans(model, ["a 3 b +4 c *7"]), 0.1).steps[0].intervention.strength, 2)
    0.36
    """
    steps = []
    for number, step in enumerate(recipe.steps):
        if not isinstance(step.intervention, Add):
            raise ValueError(f"A ratio sets the strength of Adds; step {number} is a {step.intervention.kind}.")
        unit = Step(replace(step.intervention, strength=1.0), step.scope)
        log = fired_on(model, replace(recipe, steps=(unit,)), spans)
        sign = math.copysign(1.0, step.intervention.strength)
        steps.append(Step(replace(step.intervention, strength=sign * ratio / log.mean_ratio(0)), step.scope))
    return replace(recipe, steps=tuple(steps))


@torch.no_grad()
def fired_on(model: PreTrainedModel, recipe: Recipe, spans: Sequence[Span]) -> FireLog:
    """What a recipe touches in spans, one pass a span. Raises `NeverFired` where that is nothing."""
    with applied(model, recipe) as fired:
        for span in spans:
            model(input_ids=torch.tensor([span.ids[: span.stop]], device=model.device), use_cache=False)
    return fired


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with every strength times `factor`. Raises ValueError for a step that has none.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, Recipe
    >>> from steer.runtime import scaled
    >>> recipe = Recipe.of(load("organism"), [Add(Site(2, "resid_post"), torch.ones(96), 0.5)])
    >>> scaled(recipe, 3.0).steps[0].intervention.strength
    1.5
    """
    for step in recipe.steps:
        if isinstance(step.intervention, Force | Forbid):
            raise ValueError(
                f"A {step.intervention.kind} at {step.intervention.site} is done or not: it has no strength."
            )
    steps = [
        Step(with_fields(step.intervention, strength=step.intervention.strength * factor), step.scope)
        for step in recipe.steps
    ]
    return replace(recipe, steps=tuple(steps))
