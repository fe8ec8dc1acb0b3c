"""What of a recipe a neighbour's file may hold: what it cannot is refused by name, and nothing is dropped."""

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.files import check_keys
from probes.model.loading import identity_of
from probes.model.sites import Site
from probes.texts import parse_json
from steer.interventions.activation import Ablate
from steer.recipes.recipe import Recipe, Step
from steer.recipes.scope import Scope

OURS = "thinksteer"  # the key of what we add, where a format has room


def check_steps(
    recipe: Recipe,
    name: str,
    *,
    kinds: Collection[str] = ("add",),
    sites: Collection[str] = ("resid_post",),
    scope: Callable[[Scope], bool] = lambda scope: scope == Scope(),
    scopes: str = "all",
) -> None:
    """Raise ValueError for the first step that a file of format `name` cannot hold, saying what it can.

    `scope` tells the scopes that it holds, `scopes` names them. An Ablate is held only whole, at strength 1.
    """
    if not recipe.steps:
        raise ValueError(f"The recipe has no steps, so there is nothing to write as {name}.")
    for number, step in enumerate(recipe.steps):
        x, site = step.intervention, step.intervention.site
        if site.head is not None:
            raise refusal(name, number, step, "it holds no single heads. A checkpoint or an adapter does.")
        if site.name not in sites:
            same = f" L{site.layer - 1}.resid_post is the same stream." if _is_output_before(site) else ""
            raise refusal(name, number, step, f"it holds the sites {', '.join(sites)} alone.{same}")
        if x.kind not in kinds:
            raise refusal(name, number, step, f"it holds the kinds {', '.join(kinds)} alone.")
        if isinstance(x, Ablate) and x.strength != 1:
            raise refusal(name, number, step, f"it ablates wholly, and the strength is {x.strength:g}, not 1.")
        if not scope(step.scope):
            raise refusal(name, number, step, f"it holds the scope {scopes} alone.")
        if x.vector is not None and not torch.equal(x.vector.float().to(x.vector.dtype), x.vector):
            raise refusal(name, number, step, f"it holds float32, which would round a vector of {x.vector.dtype}.")


def refusal(name: str, number: int, step: Step, reason: str) -> ValueError:
    x = step.intervention
    return ValueError(f"Step {number} ({x.kind} at {x.site}, scope {step.scope}) cannot be written as {name}: {reason}")


def added(steps: Sequence[Step]) -> dict[Site, Float[Tensor, " d_model"]]:
    """What Adds add at each site, in float32: their vectors times their strengths, summed where a site has several."""
    total: dict[Site, Tensor] = {}
    for step in steps:
        x = step.intervention
        assert x.vector is not None
        shift = x.strength * x.vector.detach().cpu().float()
        total[x.site] = total[x.site] + shift if x.site in total else shift
    return total


def notes(recipe: Recipe) -> str:
    """What we add to a file that has room: the method, and the identity of the model the recipe was made on."""
    return json.dumps({"method": recipe.method, "model": recipe.model})


def recipe_of(model: PreTrainedModel, steps: Sequence[Step], path: Path, noted: str | None, method: str = "") -> Recipe:
    """The recipe that a file holds, checked against the model. `said` are the notes that we left in it, if we did.

    Raises ValueError where the notes name another model, or a vector does not fit.
    """
    identity = identity_of(model)
    if noted is not None:
        fields = parse_json(noted, f"What ThinkSteer noted in {path}")
        check_mapping(fields, f"What ThinkSteer noted in {path}")
        check_keys(fields, ("method", "model"), f"What ThinkSteer noted in {path}")
        if not isinstance(fields["model"], dict) or not isinstance(fields["method"], str):
            raise ValueError(f"What ThinkSteer noted in {path} is malformed: make the file again.")
        check_keys(fields["model"], identity, f"The model noted in {path}")
        identity, method = fields["model"], fields["method"]
    recipe = Recipe(tuple(steps), identity, method)
    recipe.check(model)
    return recipe


def check_mapping(value: Any, where: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where} is {type(value).__name__}, where a mapping of words was expected.")


def _is_output_before(site: Site) -> bool:
    return site.name == "resid_pre" and site.layer > 0
