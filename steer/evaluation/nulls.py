"""The nulls of a recipe: the same steps along random directions of the same norms, erasures of the same size."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from probes.generation.sampling import Sampling
from probes.model.hooks import captured
from probes.model.sites import Site
from probes.thinking.spans import Span
from steer.evaluation._evaluate import solve
from steer.interventions.activation import Ablate, with_fields
from steer.recipes.recipe import Recipe, Step
from steer.runtime.calibration import calibrated, divergence, fired_on
from steer.tasks.task import Problem


def random_recipe(recipe: Recipe, *, seed: int) -> Recipe:
    """Each vector is replaced by a random direction of its norm; equal vectors by one. Scopes and numbers stay.

    Raises ValueError where no step has a vector: there is nothing to draw.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, Recipe
    >>> from steer.evaluation.nulls import random_recipe
    >>> recipe = Recipe.of(load("organism"), [Add(Site(1, "resid_post"), torch.ones(96), 0.5)], method="ones")
    >>> null = random_recipe(recipe, seed=0)
    >>> null.method, [round(float(r.steps[0].intervention.vector.norm()), 3) for r in (recipe, null)]
    ('ones, random directions, seed 0', [9.798, 9.798])
    """
    # Far from the seeds that vectors are drawn with elsewhere: a null of a random vector must not be that vector.
    generator, drawn = torch.Generator().manual_seed(1_000_003 + seed), list[tuple[Tensor, Tensor]]()

    def null(vector: Tensor) -> Tensor:
        for old, new in drawn:
            if torch.equal(old, vector):
                return new
        noise = torch.randn(vector.shape, generator=generator)
        drawn.append((vector, (noise * (vector.float().norm() / noise.norm())).to(vector)))
        return drawn[-1][1]

    def step_of(step: Step) -> Step:
        x = step.intervention
        if x.vector is None:
            return step
        birth = x.birth and x.birth.made(f"random direction of the norm of ({x.birth.estimator})", seed=seed)
        return Step(with_fields(x, vector=null(x.vector), birth=birth), step.scope)

    steps = [step_of(step) for step in recipe.steps]
    if not drawn:
        raise ValueError("No step of the recipe has a vector, so that it has no random direction to be compared with.")
    return replace(recipe, steps=tuple(steps), method=f"{recipe.method}, random directions, seed {seed}")


@torch.no_grad()
def random_erasure(model: PreTrainedModel, recipe: Recipe, spans: Sequence[Span], *, seed: int) -> Recipe:
    """Erases something else of the same size: each Ablate's direction is a random one among those that its site holds.

    It is a Gaussian mixture of the activations at `spans`, which a direction drawn in the whole stream would hardly
    meet. The strength makes the mean ‖Δ‖/‖x‖ over `spans` that of the recipe's own step; where a step sets a value
    other than 0, the null sets the mean of the spans. Raises ValueError where a step is no Ablate.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Ablate, Recipe
    >>> from steer.evaluation.nulls import random_erasure
    >>> from steer.runtime import prompt_spans
    >>> model, site = load("organism"), Site(2, "result", head=1)
    >>> recipe = Recipe.of(model, [Ablate(site, torch.ones(96))])
    >>> null = random_erasure(model, recipe, prompt_spans(model, ["a 3 b +4 c *7", "a 5 b -2 c +9"]), seed=0)
    >>> abs(float(torch.cosine_similarity(null.steps[0].intervention.vector, torch.ones(96), 0))) < 0.9
    True
    """
    for number, step in enumerate(recipe.steps):
        if not isinstance(step.intervention, Ablate):
            raise ValueError(f"An erasure is an Ablate, but step {number} is a {step.intervention.kind}.")
    held: dict[Site, list[Tensor]] = {step.intervention.site: [] for step in recipe.steps}
    with captured(model, held) as cache:
        for span in spans:
            model(input_ids=torch.tensor([span.ids[: span.stop]], device=model.device), use_cache=False)
            for site, rows in held.items():
                rows.append(cache[site][0, span.start : span.stop].float().cpu())
    generator = torch.Generator().manual_seed(2_000_003 + seed)

    def null(step: Step) -> Step:
        x, old = torch.cat(held[step.intervention.site]), cast("Ablate", step.intervention)
        mixed = torch.randn(len(x), generator=generator) @ x
        unit = mixed / mixed.norm()
        target = float((x @ unit).mean()) if old.target else 0.0
        birth = old.birth and old.birth.made(f"random erasure of the size of ({old.birth.estimator})", seed=seed)
        return Step(replace(old, vector=unit.to(old.vector), target=target, birth=birth), step.scope)

    words = f"{recipe.method}, random erasure, seed {seed}"
    drawn = replace(recipe, steps=tuple(map(null, recipe.steps)), method=words)
    wanted, have = fired_on(model, recipe, spans), fired_on(model, drawn, spans)
    factors = [wanted.mean_ratio(i) / have.mean_ratio(i) for i in range(len(recipe.steps))]
    sized = [
        Step(with_fields(step.intervention, strength=step.intervention.strength * factor), step.scope)
        for step, factor in zip(drawn.steps, factors, strict=True)
    ]
    return replace(drawn, steps=tuple(sized))


N_JUDGED = 32


def plain_spans(model: PreTrainedModel, problems: Sequence[Problem], sampling: Sampling, batch_size: int) -> list[Span]:
    """All that the plain model writes to some selection problems: where a null's effect is measured.

    Each span is the positions whose next token is one of the completion's.

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.evaluation.nulls import plain_spans
    >>> model = load("organism")
    >>> sampling = Sampling.of(model, max_new_tokens=48)
    >>> spans = plain_spans(model, task_named("chains").sample(2, "select"), sampling, batch_size=2)
    >>> [(span.start, span.stop) for span in spans]
    [(13, 35), (15, 40)]
    """
    done = solve(model, problems, sampling=sampling, batch_size=batch_size, label="plain, selection split")
    return [Span(c.all_ids, len(c.prompt_ids) - 1, len(c.all_ids) - 1) for c in done]


def random_arms(
    model: PreTrainedModel, name: str, recipe: Recipe, draws: int, judged: Sequence[Span]
) -> tuple[dict[str, list[Recipe]], tuple[str, ...]]:
    """Arms of random directions of the same norms, and of the same divergence on `judged`; and what could not be made.

    An arm is a list of draws, which `evaluate` pools. What could not be made is told in sentences: nothing is raised.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, Recipe
    >>> from steer.evaluation.nulls import random_arms
    >>> from steer.runtime import prompt_spans
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Add(Site(1, "resid_post"), torch.ones(96), 0.5)])
    >>> arms, notes = random_arms(model, "edited", recipe, 2, prompt_spans(model, ["a 3 b +4 c *7"]))
    >>> {name: len(draws) for name, draws in arms.items()}, notes
    ({'edited: random, same norm': 2, 'edited: random, same KL': 2}, ())
    """
    arms: dict[str, list[Recipe]] = {}
    try:
        same_norm = [random_recipe(recipe, seed=i) for i in range(draws)]
        arms[f"{name}: random, same norm"] = same_norm
        kl = divergence(model, recipe, judged)
        arms[f"{name}: random, same KL"] = [calibrated(model, null, judged, kl) for null in same_norm]
    except ValueError as error:
        return arms, (f"{name} is reported without some of its random directions: {error}",)
    return arms, ()
