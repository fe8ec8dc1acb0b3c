"""What was written into the stream at the last position of one pass, and by which experts."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.lens.inputs import last_logits
from probes.model.architectures import block_of, has_site, multiplier_of, n_layers, row_at
from probes.model.hooks import hook_sites
from probes.model.passes import hooked
from probes.model.placing.watching import is_norm
from probes.model.routers import SparseBlock, sparse_block
from probes.model.sites import Site, SiteName

_NAMES: tuple[SiteName, ...] = ("resid_pre", "z", "attn_out", "mlp_out", "resid_post")


@dataclass(frozen=True, eq=False)
class ExpertWrites:
    """What each chosen expert wrote; `shared` where something else of the MLP wrote beside them."""

    ids: tuple[int, ...]
    writes: Float[Tensor, "k d_model"]
    shared: bool


@dataclass(frozen=True, eq=False)
class Writes:
    """Activations of the last position, and the logits after it; by layer what its experts wrote, and what its MLP put
    out before a norm."""

    at: dict[Site, Float[Tensor, " width"]]
    logits: Float[Tensor, " d_vocab"]
    experts: dict[int, ExpertWrites] = field(default_factory=dict)
    before: dict[int, Float[Tensor, " d_model"]] = field(default_factory=dict)


def read_writes(model: PreTrainedModel, ids: Sequence[int]) -> Writes:
    """One pass over the ids."""
    sites = [Site(i, name) for i in range(n_layers(model)) for name in _NAMES if has_site(model, i, name)]
    blocks = {layer: block for layer in range(n_layers(model)) if (block := _block(model, layer)) is not None}
    seen: dict[Site, Tensor] = {}
    calls: dict[int, list[Tensor]] = {}
    before: dict[int, Tensor] = {}

    def keep(site: Site, x: Tensor) -> None:
        seen[site] = x[0, -1].detach().clone()

    with ExitStack() as stack:
        stack.enter_context(hook_sites(model, {site: partial(keep, site) for site in sites}))
        for layer, block in blocks.items():
            _watch(stack, model, layer, block, calls, before)
        logits = last_logits(model, torch.tensor([ids], device=model.device))[0]
    experts = {}
    for layer, (x, chosen, weights) in calls.items():
        before.setdefault(layer, seen[Site(layer, "mlp_out")] / multiplier_of(model))
        written = blocks[layer].experts.forward(  # not called: no hook is to see it
            x.expand(len(chosen), -1), chosen.expand(len(chosen), -1), torch.diag(weights)
        )
        experts[layer] = ExpertWrites(tuple(chosen.tolist()), written, _has_more(model, layer, blocks[layer]))
    return Writes(seen, logits, experts, before)


def _block(model: PreTrainedModel, layer: int) -> SparseBlock | None:
    """The sparse block of a layer whose experts can be told apart; None where they cannot, or there is none."""
    block, path = sparse_block(model, layer), row_at(model, layer).mlp_norm
    if block is None or not has_site(model, layer, "mlp_out"):
        return None
    readable = all(hasattr(block.router, name) for name in ("num_experts", "top_k"))
    return block if readable and (path is None or is_norm(block_of(model, layer).get_submodule(path))) else None


def _watch(
    stack: ExitStack, model: PreTrainedModel, layer: int, block: SparseBlock, calls: dict[int, list[Tensor]],
    before: dict[int, Tensor],
) -> None:  # fmt: skip
    """Keep what the experts are called with, and what a norm after the MLP reads."""

    def called(_module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if len(args) == 3 and all(part.dim() == 2 for part in args):  # tokens one after another
            calls[layer] = [part[-1].detach() for part in args]

    def normed(_module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        before[layer] = args[0][0, -1].detach()

    stack.enter_context(hooked(model, block.experts, called, side="input", place=f"the experts of layer {layer}"))
    path = row_at(model, layer).mlp_norm
    if path is not None:
        norm = block_of(model, layer).get_submodule(path)
        stack.enter_context(hooked(model, norm, normed, side="input", place=f"the norm of layer {layer}"))


def _has_more(model: PreTrainedModel, layer: int, block: SparseBlock) -> bool:
    """Are there matrices beside the experts and the router in what writes `mlp_out`?"""
    tap = row_at(model, layer).taps["mlp_out"]
    path = tap.path if row_at(model, layer).mlp_norm is None else ""
    known = {id(x) for part in (block.router, block.experts) for x in part.parameters()}
    inside = block.block if not path else block_of(model, layer).get_submodule(path)
    return any(x.dim() > 1 and id(x) not in known for x in inside.parameters())
