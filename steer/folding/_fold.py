"""Write a recipe into the weights, so that the plain checkpoint behaves as if steered."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.model.architectures import (
    architecture_of,
    block_of,
    config_of,
    multiplier_of,
    n_heads,
    o_proj_bias,
    o_proj_of,
    output_first,
    width_of,
)
from probes.model.loading import origin_of
from probes.model.quantised import is_quantised
from probes.model.sites import Site, SiteName
from steer.folding.draft import Draft, NeedsBias, NotFoldable
from steer.folding.routing import fold_routing
from steer.interventions.affine import Affine, Linear
from steer.interventions.routing import RoutingEdit
from steer.recipes.recipe import Recipe, Step
from steer.recipes.scope import Scope
from steer.runtime._applied import applied

# Within a layer, `o_proj` is changed from the left by `result`, from the right by `z`, then from the left as a whole:
# a shift of z passes through what `result` does to a head.
_ORDER: tuple[SiteName, ...] = ("result", "z", "attn_out", "mlp_out")


@dataclass(frozen=True)
class FoldReport:
    """What was written: the names of the tensors that changed.

    >>> from steer.folding import FoldReport
    >>> FoldReport(("model.layers.1.self_attn.o_proj.weight",)).changed
    ('model.layers.1.self_attn.o_proj.weight',)
    """

    changed: tuple[str, ...]


def fold(model: PreTrainedModel, recipe: Recipe) -> FoldReport:
    """Change `model` in place into the model that `recipe` steers at run time, at every token.

    Computed in float32 and rounded once. Raises `NotFoldable`, naming the site and the reason, and changes nothing,
    where no change of weights is equal.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Ablate, Recipe, fold
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Ablate(Site(1, "result", head=2), torch.ones(96))])
    >>> fold(model, recipe).changed  # this model object is changed; `folded` gives a copy
    ('model.layers.1.self_attn.o_proj.weight',)
    """
    recipe.check(model)
    draft = drafted(model, recipe)
    draft.write()
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return FoldReport(tuple(sorted(names[id(parameter)] for parameter in draft.copies)))


def folded(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """A copy of the model with the recipe in its weights; a bias is declared where a shift needs one.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Ablate, Recipe, folded
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Ablate(Site(1, "result", head=2), torch.ones(96))])
    >>> bool(
    ...     (
    ...         folded(model, recipe).model.layers[1].self_attn.o_proj.weight
    ...         != model.model.layers[1].self_attn.o_proj.weight
    ...     ).any()
    ... )
    True
    """
    recipe.check(model)
    twin = copy.deepcopy(model)
    try:
        draft = drafted(twin, recipe)
    except NeedsBias:
        twin = declare_bias(model)
        draft = drafted(twin, recipe)
    draft.write()
    return twin


def check_folds(model: PreTrainedModel, recipe: Recipe) -> None:
    """Raise `NotFoldable` where `folded` would, without copying the model.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, NotFoldable, Recipe
    >>> from steer.folding import check_folds
    >>> model = load("organism")
    >>> try:
    ...     check_folds(model, Recipe.of(model, [Add(Site(1, "resid_post"), torch.ones(96))]))
    ... except NotFoldable as error:
    ...     print(error)
    L1.resid_post is not written by one matrix, but by the whole stream before it.
    """
    recipe.check(model)
    try:
        drafted(model, recipe)
    except NeedsBias:
        _bias_key(model)


@torch.no_grad()
def declare_bias(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that computes the same function, whose config declares attention biases, and whose biases are zero.

    Raises `NotFoldable` where the family's config cannot declare one.
    """
    key = _bias_key(model)
    config = copy.deepcopy(model.config)
    setattr(config, key, True)
    make: Callable[..., PreTrainedModel] = type(model)
    twin: PreTrainedModel = cast("Any", make(config)).to(dtype=model.dtype, device=model.device).eval()
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    if unexpected or not all(name.endswith(".bias") for name in missing) or o_proj_bias(twin, 0) is None:
        raise NotFoldable(f"{key} declares no bias for o_proj in {config_of(model).model_type}.")
    for name in missing:
        twin.get_parameter(name).zero_()
    twin.generation_config = copy.deepcopy(model.generation_config)
    setattr(twin, "_thinksteer", origin_of(model))
    out: PreTrainedModel = twin
    return out


@torch.no_grad()
def fold_error(model: PreTrainedModel, twin: PreTrainedModel, recipe: Recipe, ids: Tensor, mask: Tensor) -> float:
    """The largest difference of a logit between the steered model and the folded one, on a batch.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Ablate, Recipe, folded
    >>> from steer.folding import fold_error
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Ablate(Site(1, "result", head=2), torch.ones(96))])
    >>> ids = torch.tensor([[1, 6, 17, 5, 3]])
    >>> fold_error(model, folded(model, recipe), recipe, ids, torch.ones_like(ids)) < 1e-4
    True
    """
    with applied(model, recipe):
        steered = model(input_ids=ids, attention_mask=mask).logits.float()
    plain = twin(input_ids=ids, attention_mask=mask).logits.float()
    return float((steered - plain)[mask.bool()].abs().max())


@torch.no_grad()
def drafted(model: PreTrainedModel, recipe: Recipe) -> Draft:
    """What the recipe makes of the weights; the model is not touched."""
    if is_quantised(model):
        raise NotFoldable(
            f"The weights of {origin_of(model).name!r} are quantised, and an edit of packed numbers would be another "
            "one. Fold into the model loaded unquantised, then quantise the export; at run time the recipe works as is."
        )
    draft = Draft()
    affines: dict[Site, Affine] = {}
    for step in recipe.steps:
        if isinstance(step.intervention, RoutingEdit):
            _refuse_scope(step)
            fold_routing(model, step.intervention, draft)
            continue
        site, affine = step.intervention.site, _affine_of(model, step)
        affines[site] = affines[site].then(affine) if site in affines else affine
    for site in sorted(affines, key=_rank):
        _fold_affine(model, site, affines[site], draft)
    return draft


def _bias_key(model: PreTrainedModel) -> str:
    key = architecture_of(model).declares_bias
    if key is None:
        raise NotFoldable(f"The config of {config_of(model).model_type} cannot declare a bias for o_proj.")
    return key


def _rank(site: Site) -> tuple[int, int, bool]:
    """Where in the order of folding; the whole of z is edited before its heads, so it is folded after them."""
    return site.layer, _ORDER.index(site.name) if site.name in _ORDER else len(_ORDER), site.head is None


def _affine_of(model: PreTrainedModel, step: Step) -> Affine:
    intervention, site = step.intervention, step.intervention.site
    _refuse_scope(step)
    if not isinstance(intervention, Linear):
        raise NotFoldable(f"A {intervention.kind} at {site} is not linear: keep it as a run-time intervention.")
    affine = intervention.affine(width_of(model, site))
    device = o_proj_of(model, site.layer).get_parameter("weight").device
    return Affine(*(tensor.float().to(device) for tensor in (affine.down, affine.up, affine.shift)))


def _refuse_scope(step: Step) -> None:
    if step.scope != Scope():
        raise NotFoldable(
            f"{step.intervention.site} is changed in scope '{step.scope}', but weights act on every token."
        )


def _fold_affine(model: PreTrainedModel, site: Site, affine: Affine, draft: Draft) -> None:
    row = architecture_of(model)
    match site.name:
        case "z":
            _fold_input(model, site, affine, draft)
        case "result":
            _fold_head(model, site, affine, draft)
        case "attn_out":
            _refuse_norm(row.attn_norm, site)
            _fold_output(model, site, affine, draft, writers=(row.o_proj,))
        case "mlp_out":
            _refuse_norm(row.mlp_norm, site)
            _fold_output(model, site, affine, draft, writers=row.mlp_writers, loose=row.expert_biases)
        case _:
            raise NotFoldable(f"{site} is not written by one matrix, but by the whole stream before it.")


def _refuse_norm(norm: str | None, site: Site) -> None:
    if norm is not None:
        raise NotFoldable(f"{site} is behind a norm, so no matrix writes it.")


def _fold_output(
    model: PreTrainedModel,
    site: Site,
    affine: Affine,
    draft: Draft,
    *,
    writers: tuple[str, ...],
    loose: tuple[str, ...] = (),
) -> None:
    """y = x Wᵀ + b becomes y + (y down) up + shift, where the stream gets y times the family's multiplier.

    `loose` names biases that are no part of a module.
    """
    named = dict(block_of(model, site.layer).named_parameters())
    present = [path for path in writers if path in named or f"{path}.weight" in named]
    if not present:
        raise NotFoldable(f"{site} is written by matrices that no row names for {config_of(model).model_type}.")
    biases = [named[name] for name in (*(f"{path}.bias" for path in present), *loose) if name in named]
    holds_shift = len(present) == len(biases) == 1 and not loose
    if affine.shift.any() and not holds_shift:
        raise NotFoldable(f"{site} has no one bias to hold a shift: keep it as a run-time intervention.")
    for path in present:
        stored = draft[named[path] if path in named else named[f"{path}.weight"]]
        weight = output_first(model, path, stored)
        weight += affine.up.T @ (affine.down.T @ weight)  # [... d_model d_in]
    for bias in biases:
        value = draft[bias]
        value += (value @ affine.down) @ affine.up + affine.shift / multiplier_of(model)


def _fold_input(model: PreTrainedModel, site: Site, affine: Affine, draft: Draft) -> None:
    """y = x Wᵀ + b becomes (x + (x down) up + shift) Wᵀ + b."""
    weight, bias = _columns(model, site, draft), _bias_for(model, site, affine)
    if bias is not None:
        draft[bias].add_(weight @ affine.shift)
    weight += (weight @ affine.up.T) @ affine.down.T


def _fold_head(model: PreTrainedModel, site: Site, affine: Affine, draft: Draft) -> None:
    """A head's write w = W_h z becomes w + (w down) up + shift; the bias belongs to no head."""
    weight, bias = _columns(model, site, draft), _bias_for(model, site, affine)
    weight += affine.up.T @ (affine.down.T @ weight)
    if bias is not None:
        draft[bias].add_(affine.shift)


def _bias_for(model: PreTrainedModel, site: Site, affine: Affine) -> nn.Parameter | None:
    """`o_proj`'s bias if there is a shift for it to hold."""
    if not affine.shift.any():
        return None
    bias = o_proj_bias(model, site.layer)
    if bias is None:
        raise NeedsBias(f"{site} has no bias to hold a shift: declare one, or keep it as a run-time intervention.")
    return bias


def _columns(model: PreTrainedModel, site: Site, draft: Draft) -> Tensor:
    """The part of `o_proj` that reads the site, `[d_model, width]`: a view of the draft."""
    stored = draft[o_proj_of(model, site.layer).get_parameter("weight")]
    weight = output_first(model, architecture_of(model).o_proj, stored)
    if site.head is None:
        return weight
    out: Tensor = weight.unflatten(1, (n_heads(model), -1))[:, site.head]
    return out
