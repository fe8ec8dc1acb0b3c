"""An affine change of what a site holds, in the matrices that write it or read it."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.model.architectures import (
    block_of,
    config_of,
    multiplier_of,
    n_heads,
    o_proj_bias,
    o_proj_of,
    output_first,
    path_of_o_proj,
    row_at,
)
from probes.model.sites import Site
from steer.folding.draft import Draft, NeedsBias, NotFoldable
from steer.interventions.affine import Affine


def fold_affine(model: PreTrainedModel, site: Site, affine: Affine, draft: Draft) -> None:
    """Into the draft; raises `NotFoldable` where no matrix of its own writes the site."""
    row = row_at(model, site.layer)
    match site.name:
        case "z":
            _fold_input(model, site, affine, draft)
        case "result":
            _fold_head(model, site, affine, draft)
        case "attn_out":
            _refuse_norm(row.attn_norm, site)
            _fold_output(model, site, affine, draft, writers=(row.o_proj,) if row.o_proj else ())
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
        weight = output_first(row_at(model, site.layer), path, stored)
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
    weight = output_first(row_at(model, site.layer), path_of_o_proj(model, site.layer), stored)
    if site.head is None:
        return weight
    out: Tensor = weight.unflatten(1, (n_heads(model, site.layer), -1))[:, site.head]
    return out
