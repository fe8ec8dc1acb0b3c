"""What must hold of a model if its sites are where its row says; checked at load where no row names its class."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.model.architectures import (
    architecture_of,
    block_of,
    has_site,
    head_matrices,
    is_parallel,
    layers_with_heads,
    multiplier_of,
    n_heads,
    n_layers,
    o_proj_bias,
    o_proj_of,
    path_of_o_proj,
    row_at,
    width_of,
)
from probes.model.families import Architecture
from probes.model.hooks import captured
from probes.model.passes import hooked
from probes.model.placing.conduct import broken_conduct
from probes.model.placing.sums import SHAPE, add_up, carries, close, random_ids
from probes.model.placing.watching import is_norm
from probes.model.quantised import own_weight
from probes.model.sites import Site, SiteName

_READ: tuple[SiteName, ...] = (
    "resid_pre", "resid_mid", "resid_post", "attn_in", "attn_out", "mlp_in", "mlp_out", "z",
)  # fmt: skip
_QUERIES = ("q_proj", "q_b_proj")


def broken_identity(model: PreTrainedModel) -> str | None:
    """The first identity that the model's row breaks, in words; None where all hold.

    In every layer: the stream adds up, each summand with factor one; a parallel block's attention and MLP read the
    same; the heads' writes and the bias are what `o_proj` puts out, and it reads `z`. The final norm of the last
    `resid_post` is `hidden_states[-1]`, and the streams before are the other `hidden_states`. A head's query moves its
    own slice of `z` alone, in the first layer of each width. No token changes a stream before it; neither pads nor a
    cache change any. Short forward passes of random tokens. What is added to the stream is measured against itself, not
    against the stream: an error is what dtype's rounding does not explain.

    >>> from probes.model import broken_identity, load
    >>> broken_identity(load("organism")) is None
    True
    """
    row = architecture_of(model)
    for path in (row.layers, row.final_norm):
        if missing(model, path):
            return f"the model has no {path}"
    for layer, block in enumerate(model.get_submodule(row.layers).children()):
        own = row_at(model, layer)
        for path in dict.fromkeys((own.o_proj or "", *(own.taps[name].path for name in _names(model, layer)))):
            if missing(block, path):
                return f"a block has no {path}"
        if own.o_proj is None:
            continue
        try:
            own_weight(o_proj_of(model, layer), f"{own.o_proj} of layer {layer}")
        except ValueError as error:
            return str(error).removesuffix(".")
        width, heads = width_of(model, Site(layer, "z")), n_heads(model, layer)
        if width % heads:
            return f"o_proj of layer {layer} reads {width} channels, which {heads} heads do not divide"
    with torch.no_grad():
        return next(_broken(model, row), None)


def _names(model: PreTrainedModel, layer: int) -> list[SiteName]:
    """The sites of a layer that are looked at."""
    return [name for name in _READ if has_site(model, layer, name)]


def _broken(model: PreTrainedModel, row: Architecture) -> Iterator[str]:
    sites = [Site(layer, name) for layer in range(n_layers(model)) for name in _names(model, layer)]
    ids = random_ids(model)
    try:
        with captured(model, sites) as cache:
            hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # whatever a family's own code raises
        yield f"a short pass of its token ids fails, {type(error).__name__}: {error}"
        return
    for site in sites:
        if site not in cache:
            yield f"{site} was never reached"
            return
        if cache[site].shape != (*SHAPE, width_of(model, site)):
            yield f"{site} is no [batch, position, {width_of(model, site)}], but {list(cache[site].shape)}"
            return
    for layer in range(n_layers(model)):
        x = {name: cache[Site(layer, name)] for name in _names(model, layer)}
        yield from _broken_sums(model, layer, x)
        if is_parallel(model) and not _one_stream(model, layer, x):
            yield f"attention and MLP do not read the same stream in layer {layer}"
        plain = "z" in x and "attn_out" in x and row_at(model, layer).attn_norm is None
        if plain and not _heads_add_up(model, layer, x["z"].float(), x["attn_out"].float()):
            yield f"the heads of layer {layer} do not add up to its attn_out"
        if layer and not any(close(x["resid_pre"], hidden[at]) for at in (layer, layer - 1)):  # Mamba begins after 0
            yield f"L{layer}.resid_pre is not hidden_states[{layer}]"
    last = cache[Site(n_layers(model) - 1, "resid_post")]
    if not close(model.get_submodule(row.final_norm)(last) if row.final_norm else last, hidden[-1]):
        yield f"{row.final_norm} of the last resid_post is not hidden_states[-1]"
    with_heads = layers_with_heads(model)
    yield from broken_conduct(model)
    widths = {(width_of(model, Site(layer, "z")), n_heads(model, layer)): layer for layer in with_heads}
    yield from (fault for layer in widths.values() if (fault := _mixed_heads(model, layer)) is not None)


def _broken_sums(model: PreTrainedModel, layer: int, x: dict[SiteName, Tensor]) -> Iterator[str]:
    """The stream adds up, as far as its summands are sites; at least one of them is."""
    row, last = row_at(model, layer), [name for name in ("attn_out", "mlp_out") if name in x]
    sums: list[tuple[SiteName, list[SiteName]]] = []
    if "resid_mid" not in x:
        sums.append(("resid_post", ["resid_pre", *last]))
    else:
        if "attn_out" in x:
            sums.append(("resid_mid", ["attn_in" if row.normed else "resid_pre", "attn_out"]))
        if "mlp_out" in x:
            sums.append(("resid_post", ["mlp_in" if row.normed else "resid_mid", "mlp_out"]))
    if not last:
        yield f"nothing is known to be added to the stream in layer {layer}"
    for whole, parts in sums:
        base, *added = [x[part].to(x[whole].device) for part in parts]
        if not (carries(x[whole], base, *added) if row.normed else add_up(x[whole], [base, *added])):
            yield f"{whole} = {' + '.join(parts)} does not hold in layer {layer}"


def _one_stream(model: PreTrainedModel, layer: int, x: dict[SiteName, Tensor]) -> bool:
    """Does a parallel block's MLP read what attention reads, or the block's stream, by a norm of the block's?"""
    norms = [module for module in block_of(model, layer).children() if is_norm(module)]
    reads = (norm(x["resid_pre"]) for norm in norms if any(True for _ in norm.parameters()))
    return close(x["mlp_in"], x["attn_in"]) or any(close(x["mlp_in"], read) for read in reads)


def _heads_add_up(model: PreTrainedModel, layer: int, z: Tensor, attn_out: Tensor) -> bool:
    bias, matrices = o_proj_bias(model, layer), head_matrices(model, layer).float()
    writes = torch.einsum("bphk,dhk->bpd", z.unflatten(-1, (n_heads(model, layer), -1)), matrices)
    return close(attn_out, (writes if bias is None else writes + bias.float()) * multiplier_of(model))


def _mixed_heads(model: PreTrainedModel, layer: int) -> str | None:
    """A head's queries, their sign turned (which no norm over all heads sees), change the head's slice of z alone."""
    attention = block_of(model, layer).get_submodule(path_of_o_proj(model, layer).rpartition(".")[0])
    query = next((module for name in _QUERIES if (module := getattr(attention, name, None)) is not None), None)
    heads = n_heads(model, layer)
    if heads == 1 or not isinstance(query, nn.Linear) or query.out_features % heads:
        return None

    def turned(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        by_head: Tensor = output.unflatten(-1, (heads, -1)).clone()
        by_head[..., 0, :] *= -1
        out: Tensor = by_head.flatten(-2)
        return out

    ids, site = random_ids(model), Site(layer, "z")
    with captured(model, [site]) as plain:
        model(input_ids=ids, use_cache=False)
    with captured(model, [site]) as changed, hooked(model, query, turned, side="output", place=f"queries of {layer}"):
        model(input_ids=ids, use_cache=False)
    before, after = (cache[site].float().unflatten(-1, (heads, -1)) for cache in (plain, changed))
    if close(after[..., 1:, :], before[..., 1:, :]):
        return None
    return f"a head's queries in layer {layer} change what other heads write"


def missing(module: nn.Module, path: str) -> bool:
    """Has the module no part of that path? Of "" it is the part itself."""
    return path not in dict(module.named_modules())
