"""A recipe as edits inside a trace of nnsight, run here or on NDIF."""

import sys
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from probes.model.architectures import (
    config_of,
    has_site,
    head_matrices,
    multiplier_of,
    n_heads,
    path_of,
    row_at,
    tap_of,
)
from probes.model.delimiters import Delimiters
from probes.model.loading import load
from probes.model.sites import SITE_NAMES, Site
from steer.interop import shipped
from steer.interop._run import Run
from steer.recipes.recipe import Recipe, Step

_NUMBERS = ("strength", "target", "low", "high")


def trace_edits(
    theirs: Any,
    recipe: Recipe,
    ids: Int[Tensor, "batch pos"],
    *,
    mask: Int[Tensor, "batch pos"] | None = None,
    delimiters: tuple[str, str] | Delimiters | None = None,
) -> shipped.TraceEdits:
    """What a recipe does to these ids, to be called in a trace of them: `with lm.trace(ids): edits(lm)`.

    `theirs` is the model of nnsight, whose thinking `delimiters` open and close if the tokenizer does not say, or what
    `probes.load` gave of it. Which tokens are touched follows from the ids,
    so it is settled here, and what goes along with the trace is tensors and torch: it runs on NDIF
    (`remote=True`) as it does here, where the weights may be missing; the recipe's fingerprint is then not compared.
    What is read in the same trace at later modules is steered. Raises ValueError where the recipe was made on another
    model, or does what ids do not settle: scopes that read activations, routing, attention. Of a generation here, open
    `steer.applied(probes.load(lm), recipe)` around it, which has none of these limits.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, Recipe
    >>> from steer.interop import trace_edits
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Add(Site(2, "resid_post"), torch.ones(96), 0.05)])
    >>> edits = trace_edits(model, recipe, torch.tensor([[5, 6, 17]]))
    >>> [(action["path"], action["side"]) for action in edits.actions]
    [('model.layers.2', 'output')]
    """
    model = theirs if isinstance(theirs, PreTrainedModel) else _described(theirs, delimiters)
    _check(model, recipe)
    run = Run(model, recipe, "a trace of nnsight")
    for scope in run.gates:
        if scope.gauge is not None:
            raise ValueError(
                f"The scope {scope} reads {scope.gauge} as the model runs, and edits of a trace are settled before it. "
                "Open steer.applied(probes.load(lm), recipe) around a run here."
            )
    run.begin(ids, mask)
    actions = [action for site, steps in run.sites() for action in _actions(model, site, _told(steps, run))]
    by_value = sys.modules.get("cloudpickle")
    if by_value is not None:  # nnsight is there: what is shipped goes by its source
        by_value.register_pickle_by_value(shipped)
    return shipped.TraceEdits(sorted(actions, key=lambda action: action.pop("at")))


def _described(theirs: Any, delimiters: tuple[str, str] | Delimiters | None) -> PreTrainedModel:
    """The model inside, though its weights may be missing."""
    return load(theirs._module, tokenizer=theirs.tokenizer, delimiters=delimiters)


def _check(model: PreTrainedModel, recipe: Recipe) -> None:
    if not any(parameter.is_meta for parameter in model.parameters()):
        recipe.check(model)
        return
    family = config_of(model).model_type
    if recipe.model["model_type"] != family:
        raise ValueError(f"This recipe was made for a {recipe.model['model_type']}, and this is a {family}.")
    for step in recipe.steps:
        step.intervention.check(model)


def _told(steps: list[tuple[int, Step]], run: Run) -> list[dict[str, Any]]:
    """Kind, vector, numbers, and weight at each token."""
    told = []
    for _, step in steps:
        edit, vector = step.intervention, step.intervention.vector
        weight = run.gates[step.scope].weight(torch.float32, torch.device("cpu"))
        told.append({
            "kind": edit.kind,
            "vector": None if vector is None else vector.float(),
            "numbers": {name: getattr(edit, name) for name in _NUMBERS if hasattr(edit, name)},
            "weight": weight[..., 0].clone(),
        })  # fmt: skip
    return told


def _actions(model: PreTrainedModel, site: Site, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is kept and edited for a site; `at` orders the actions of all sites."""
    layer = site.layer
    if site.name == "resid_mid" and not row_at(model, layer).normed:
        if not has_site(model, layer, "attn_out"):
            raise ValueError(f"{site} cannot be edited in a trace: what attention adds is not one module's output.")
        keep = {**_place(model, Site(layer, "resid_pre")), "keep": layer}
        return [keep, {**_place(model, Site(layer, "attn_out")), "behind": layer, "steps": steps}]
    if site.name == "result":
        key, place = 10_000 + layer, _place(model, Site(layer, "z"))
        matrix = head_matrices(model, layer)[:, site.head].detach().float().T.contiguous()
        own = {"head": site.head, "heads": n_heads(model, layer), "matrix": matrix, "of": key, "steps": steps}
        return [{**place, "keep": key}, {**_place(model, site), **own}]
    action = {**_place(model, site), "steps": steps}
    if site.head is not None:
        action |= {"head": site.head, "heads": n_heads(model, layer)}
    if site.name in ("attn_out", "mlp_out") and multiplier_of(model) != 1:
        action["scale"] = multiplier_of(model)
    return [action]


def _place(model: PreTrainedModel, site: Site) -> dict[str, Any]:
    _, tap = tap_of(model, site)
    return {"path": path_of(model, site), "side": tap.side, "at": (site.layer, SITE_NAMES.index(site.name))}
