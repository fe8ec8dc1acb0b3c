"""Write a recipe into the weights, so that the plain checkpoint behaves as if steered."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.architectures import architecture_of, block_of, config_of, n_heads, o_proj_of
from probes.models import origin_of
from probes.sites import Site, SiteName
from steer.interventions import Affine
from steer.recipes import Recipe, Step, applied

# Within a layer, `o_proj` is changed from the left by `result`, from the right by `z`, then from the left as a whole:
# a shift of z passes through what `result` does to a head.
_ORDER: tuple[SiteName, ...] = ("result", "z", "attn_out", "mlp_out")


class NotFoldable(ValueError):
    """No change of weights equals the intervention at this site."""


class NeedsBias(NotFoldable):
    """A bias would make it foldable, and the matrix has none."""


@dataclass(frozen=True)
class FoldReport:
    """What was written: the names of the tensors that changed."""

    changed: tuple[str, ...]


class _Draft:
    """Float32 copies of the tensors that change, written back once: several edits round once, a refusal leaves none."""

    def __init__(self) -> None:
        self.copies: dict[nn.Parameter, Tensor] = {}

    def __getitem__(self, parameter: nn.Parameter) -> Tensor:
        if parameter not in self.copies:
            self.copies[parameter] = parameter.detach().float().clone()
        return self.copies[parameter]

    def write(self) -> None:
        for parameter, value in self.copies.items():
            parameter.data.copy_(value.to(parameter.dtype))


def fold(model: PreTrainedModel, recipe: Recipe) -> FoldReport:
    """Change `model` in place into the model that `recipe` steers at run time, at every token.

    Computed in float32 and rounded once. Raises `NotFoldable`, naming the site and the reason, and changes nothing,
    where no change of weights is equal.
    """
    recipe.check(model)
    return _fold(model, recipe)


def folded(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """A copy of the model with the recipe in its weights; a bias is declared where a shift needs one."""
    recipe.check(model)
    twin = copy.deepcopy(model)
    try:
        _fold(twin, recipe)
    except NeedsBias:
        twin = declare_bias(model)
        _fold(twin, recipe)
    return twin


@torch.no_grad()
def declare_bias(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that computes the same function, whose config declares attention biases, and whose biases are zero.

    Raises `NotFoldable` where the family's config cannot declare one.
    """
    key = architecture_of(model).declares_bias
    if key is None:
        raise NotFoldable(f"The config of {config_of(model).model_type} cannot declare a bias for o_proj.")
    config = copy.deepcopy(model.config)
    setattr(config, key, True)
    twin = type(model)(config).to(dtype=model.dtype, device=model.device).eval()  # type: ignore[call-arg]
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    if unexpected or not all(name.endswith(".bias") for name in missing) or o_proj_of(twin, 0).bias is None:
        raise NotFoldable(f"{key} declares no bias for o_proj in {config_of(model).model_type}.")
    for name in missing:
        twin.get_parameter(name).zero_()
    twin.generation_config = copy.deepcopy(model.generation_config)
    twin._thinksteer = origin_of(model)
    return twin


@torch.no_grad()
def fold_error(model: PreTrainedModel, twin: PreTrainedModel, recipe: Recipe, ids: Tensor, mask: Tensor) -> float:
    """The largest difference of a logit between the steered model and the folded one, on a batch."""
    with applied(model, recipe):
        steered = model(input_ids=ids, attention_mask=mask).logits.float()
    plain = twin(input_ids=ids, attention_mask=mask).logits.float()
    return float((steered - plain)[mask.bool()].abs().max())


@torch.no_grad()
def _fold(model: PreTrainedModel, recipe: Recipe) -> FoldReport:
    draft = _Draft()
    for step in sorted(recipe.steps, key=lambda s: (s.intervention.site.layer, _rank(s.intervention.site))):
        _fold_step(model, step, draft)
    draft.write()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return FoldReport(tuple(sorted(names[id(parameter)] for parameter in draft.copies)))


def _rank(site: Site) -> int:
    return _ORDER.index(site.name) if site.name in _ORDER else len(_ORDER)


def _fold_step(model: PreTrainedModel, step: Step, draft: _Draft) -> None:
    intervention, site = step.intervention, step.intervention.site
    if step.scope != "all":
        raise NotFoldable(f"{site} is changed in scope {step.scope!r}, but weights act on every token.")
    affine = getattr(intervention, "affine", None)
    if affine is None:
        raise NotFoldable(f"A {intervention.kind} at {site} is not linear: keep it as a run-time intervention.")
    device = o_proj_of(model, site.layer).weight.device
    affine = Affine(*(tensor.float().to(device) for tensor in (affine.down, affine.up, affine.shift)))
    row, block = architecture_of(model), block_of(model, site.layer)
    match site.name:
        case "z":
            _fold_input(o_proj_of(model, site.layer), affine, _columns(model, site), site, draft)
        case "result":
            _fold_head(o_proj_of(model, site.layer), affine, _columns(model, site), site, draft)
        case "attn_out":
            _fold_output([] if row.attn_norm else [o_proj_of(model, site.layer)], affine, site, draft)
        case "mlp_out":
            _fold_output([] if row.mlp_norm else _present(block, row.mlp_writers), affine, site, draft)
        case _:
            raise NotFoldable(f"{site} is not written by one matrix, but by the whole stream before it.")


def _fold_output(writers: list[nn.Module | nn.Parameter], affine: Affine, site: Site, draft: _Draft) -> None:
    """y = x Wᵀ + b becomes y + (y down) up + shift."""
    if not writers:
        raise NotFoldable(f"{site} is behind a norm, so no matrix writes it.")
    biases = [w.bias for w in writers if isinstance(w, nn.Linear) and w.bias is not None]
    if affine.shift.any() and not len(writers) == len(biases) == 1:
        raise NotFoldable(f"{site} has no one bias to hold a shift: keep it as a run-time intervention.")
    for writer in writers:
        weight = draft[writer if isinstance(writer, nn.Parameter) else writer.get_parameter("weight")]
        weight += affine.up.T @ (affine.down.T @ weight)  # [... d_model d_in]
    for bias in biases:
        value = draft[bias]
        value += (value @ affine.down) @ affine.up + affine.shift


def _fold_input(o_proj: nn.Linear, affine: Affine, columns: slice, site: Site, draft: _Draft) -> None:
    """y = x Wᵀ + b becomes (x + (x down) up + shift) Wᵀ + b."""
    _need_bias(o_proj, affine, site)
    weight = draft[o_proj.get_parameter("weight")][:, columns]  # [d_model width]
    if affine.shift.any():
        draft[o_proj.get_parameter("bias")].add_(weight @ affine.shift)
    weight += (weight @ affine.up.T) @ affine.down.T


def _fold_head(o_proj: nn.Linear, affine: Affine, columns: slice, site: Site, draft: _Draft) -> None:
    """A head's write w = W_h z becomes w + (w down) up + shift; the bias belongs to no head."""
    _need_bias(o_proj, affine, site)
    weight = draft[o_proj.get_parameter("weight")][:, columns]
    weight += affine.up.T @ (affine.down.T @ weight)
    if affine.shift.any():
        draft[o_proj.get_parameter("bias")].add_(affine.shift)


def _need_bias(o_proj: nn.Linear, affine: Affine, site: Site) -> None:
    if affine.shift.any() and o_proj.bias is None:
        raise NeedsBias(f"{site} has no bias to hold a shift: declare one, or keep it as a run-time intervention.")


def _columns(model: PreTrainedModel, site: Site) -> slice:
    if site.head is None:
        return slice(None)
    d_head = o_proj_of(model, site.layer).in_features // n_heads(model)
    return slice(site.head * d_head, (site.head + 1) * d_head)


def _present(block: nn.Module, paths: tuple[str, ...]) -> list[nn.Module | nn.Parameter]:
    named: dict[str, nn.Module | nn.Parameter] = dict(block.named_modules()) | dict(block.named_parameters())
    return [named[path] for path in paths if path in named]
