"""Write a recipe into the weights, so that the plain checkpoint behaves as if steered."""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.model.architectures import (
    architecture_of,
    config_of,
    device_at,
    o_proj_bias,
    width_of,
)
from probes.model.loading import origin_of
from probes.model.quantised import check_in_memory, check_unwrapped, is_quantised
from probes.model.sites import Site, SiteName
from steer.checkpoints.conversions import unmade
from steer.folding.affine import fold_affine
from steer.folding.draft import Draft, NeedsBias, NotFoldable, twin_of
from steer.folding.routing import fold_routing
from steer.interventions.affine import Affine, Linear
from steer.interventions.attention import Attend
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

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Ablate, Recipe
    >>> from steer.folding import fold
    >>> model = load("organism")
    >>> report = fold(model, Recipe.of(model, [Ablate(Site(2, "result", 3), torch.ones(96))]))
    >>> report.changed
    ('model.layers.2.self_attn.o_proj.weight',)
    """

    changed: tuple[str, ...]


def fold(model: PreTrainedModel, recipe: Recipe) -> FoldReport:
    """Change `model` in place into the model that `recipe` steers at run time, at every token.

    Computed in float32 and rounded once. Raises `NotFoldable`, naming the site and the reason, and changes nothing,
    where no change of weights is equal.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Ablate, Recipe
    >>> from steer.folding import fold
    >>> model, unit = load("organism"), torch.ones(96) / 96**0.5
    >>> report = fold(model, Recipe.of(model, [Ablate(Site(2, "result", 3), unit)]))
    >>> columns = model.model.layers[2].self_attn.o_proj.weight.detach().unflatten(1, (8, -1))[:, 3]
    >>> round(float((unit @ columns).norm()), 4)
    0.0
    """
    recipe.check(model)
    draft = drafted(model, recipe)
    draft.write()
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return FoldReport(tuple(sorted(names[id(parameter)] for parameter in draft.changed)))


def folded(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """The model once more, with the recipe in its weights; a bias is declared where a shift needs one.

    Only what changes takes memory; the other tensors are the model's own. So train or quantise neither of the two in
    place while the other is in use: `copy.deepcopy` takes them apart.

    Raises `NotFoldable` where no change of weights is equal, ValueError for another model's recipe.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Ablate, Recipe
    >>> from steer.folding import folded
    >>> model, name = load("organism"), "model.layers.2.self_attn.o_proj.weight"
    >>> twin = folded(model, Recipe.of(model, [Ablate(Site(2, "result", 3), torch.ones(96))]))
    >>> twin.get_parameter(name).equal(model.get_parameter(name)), twin.get_parameter(name).shape
    (False, torch.Size([96, 128]))
    """
    recipe.check(model)
    check_weights(model)
    twin = twin_of(model)
    try:
        draft = drafted(twin, recipe)
    except NeedsBias:
        draft = drafted(_declared(twin), recipe)
    draft.write()
    return twin


def check_folds(model: PreTrainedModel, recipe: Recipe) -> None:
    """Raise `NotFoldable` where `folded` would, without copying the model; ValueError for another model's recipe.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Clamp, NotFoldable, Recipe
    >>> from steer.folding import check_folds
    >>> model = load("organism")
    >>> try:
    ...     check_folds(model, Recipe.of(model, [Clamp(Site(2, "result", 3), torch.ones(96), low=0.0)]))
    ... except NotFoldable as error:
    ...     print(error)
    A clamp at L2H3.result is not linear: keep it as a run-time intervention.
    """
    recipe.check(model)
    try:
        drafted(model, recipe)
    except NeedsBias:
        _bias_key(model)


@torch.no_grad()
def declare_bias(model: PreTrainedModel) -> PreTrainedModel:
    """The same function, in a model whose config declares attention biases, and whose biases are zero.

    Its other tensors are the model's own, and all else is as in the model. Raises `NotFoldable` where the family's
    config cannot declare one.
    """
    _bias_key(model)
    return _declared(twin_of(model))


def _declared(twin: PreTrainedModel) -> PreTrainedModel:
    """The same model, with the biases that its config declares from now on."""
    key = _bias_key(twin)
    setattr(config_of(twin), key, True)
    promised, known = unmade(twin, twin.config).state_dict(), twin.state_dict()
    added = [name for name in promised if name not in known]
    if known.keys() - promised.keys() or not all(name.endswith(".bias") for name in added):
        raise NotFoldable(f"{key} declares more than biases in {config_of(twin).model_type}.")
    for name in added:
        module = twin.get_submodule(name.removesuffix(".bias"))
        module.register_parameter("bias", nn.Parameter(module.get_parameter("weight").new_zeros(promised[name].shape)))
    if o_proj_bias(twin, 0) is None:
        raise NotFoldable(f"{key} declares no bias for o_proj in {config_of(twin).model_type}.")
    return twin


@torch.no_grad()
def fold_error(model: PreTrainedModel, twin: PreTrainedModel, recipe: Recipe, ids: Tensor, mask: Tensor) -> float:
    """The largest difference of a logit between the steered model and the folded one, on a batch.

    `ids` and `mask` are [batch, pos]; padding, where the mask is 0, does not count. Raises `NeverFired` where the
    recipe touches none of it.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Ablate, Recipe
    >>> from steer.folding import fold_error, folded
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Ablate(Site(2, "result", 3), torch.ones(96))])
    >>> ids = torch.arange(20).reshape(2, 10)
    >>> fold_error(model, folded(model, recipe), recipe, ids, torch.ones_like(ids)) < 1e-4
    True
    """
    with applied(model, recipe):
        steered = model(input_ids=ids, attention_mask=mask).logits.float()
    plain = twin(input_ids=ids, attention_mask=mask).logits.float()
    return float((steered - plain)[mask.bool()].abs().max())


@torch.no_grad()
def drafted(model: PreTrainedModel, recipe: Recipe, *, rounded: bool = True) -> Draft:
    """What the recipe makes of the weights, each layer rounded once it is done; the model is not touched."""
    check_weights(model)
    draft = Draft()
    affines: dict[Site, Affine] = {}
    for step in recipe.steps:
        if isinstance(step.intervention, RoutingEdit):
            _refuse_scope(step)
            fold_routing(model, step.intervention, draft)
            continue
        site, affine = step.intervention.site, _affine_of(model, step)
        affines[site] = affines[site].then(affine) if site in affines else affine
    for _, sites in groupby(sorted(affines, key=_rank), key=lambda site: site.layer):
        for site in sites:
            fold_affine(model, site, affines[site], draft)
        if rounded:
            draft.round()
    return draft


def check_weights(model: PreTrainedModel) -> None:
    """Raise NotFoldable for quantised weights, ValueError where something is around one, or one is not in memory."""
    if is_quantised(model):
        raise NotFoldable(
            f"The weights of {origin_of(model).name!r} are quantised, and an edit of packed numbers would be another "
            "one. Fold into the model loaded unquantised, then quantise the export; at run time the recipe works as is."
        )
    check_unwrapped(model)
    check_in_memory(model)


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
    if isinstance(intervention, Attend):
        raise NotFoldable(
            f"{site} is scaled for some keys alone, and no weights tell which: keep it as a run-time intervention."
        )
    if not isinstance(intervention, Linear):
        raise NotFoldable(f"A {intervention.kind} at {site} is not linear: keep it as a run-time intervention.")
    affine = intervention.affine(width_of(model, site))
    device = device_at(model, site.layer)
    return Affine(*(tensor.float().to(device) for tensor in (affine.down, affine.up, affine.shift)))


def _refuse_scope(step: Step) -> None:
    if step.scope != Scope():
        raise NotFoldable(
            f"{step.intervention.site} is changed in scope '{step.scope}', but weights act on every token."
        )
