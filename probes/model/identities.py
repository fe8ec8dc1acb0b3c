"""What must hold of a model if its sites are where its row says; checked at load where no row names its class."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.model.architectures import (
    architecture_of,
    config_of,
    head_matrices,
    is_parallel,
    multiplier_of,
    n_heads,
    n_layers,
    o_proj_bias,
    o_proj_of,
    width_of,
)
from probes.model.families import ARCHITECTURES, GENERIC, Architecture
from probes.model.hooks import captured
from probes.model.passes import hooked
from probes.model.quantised import own_weight
from probes.model.sites import Site, SiteName

_SEQUENTIAL: tuple[tuple[SiteName, tuple[SiteName, ...]], ...] = (
    ("resid_mid", ("resid_pre", "attn_out")),
    ("resid_post", ("resid_mid", "mlp_out")),
)
_PARALLEL: tuple[tuple[SiteName, tuple[SiteName, ...]], ...] = (("resid_post", ("resid_pre", "attn_out", "mlp_out")),)
_READ: tuple[SiteName, ...] = (
    "resid_pre", "resid_mid", "resid_post", "attn_in", "attn_out", "mlp_in", "mlp_out", "z",
)  # fmt: skip
_QUERIES = ("q_proj", "q_b_proj")
_SHAPE = (2, 5)  # rows and tokens of the pass that is looked at


def place(model: PreTrainedModel) -> None:
    """Give the model a row where its family's own does not fit: by another class of it, or for a family without one.

    A text decoder inside a wrapper (vision, audio) is found where `get_decoder` says; a family without a row gets the
    first generic one. Either is taken only if its identities hold on a short forward pass. Raises ValueError, naming
    the identity that broke, where none holds: a wrong place is never read in silence.
    """
    family = config_of(model).model_type
    own = ARCHITECTURES.get(family)
    if own is not None and not _missing(model, own.layers) and not _missing(model, own.final_norm):
        setattr(model, "_thinksteer_row", own)
        return
    at = _decoder(model)
    rows = [own] if own is not None else list(GENERIC)
    if at is not None:
        rows = [_inside(row, at) for row in rows]
    fault = ""
    for row in rows:
        setattr(model, "_thinksteer_row", row)
        found = broken_identity(model)
        if found is None:
            return
        fault = fault or found
    del model._thinksteer_row
    if own is not None:
        raise ValueError(f"A {type(model).__name__} is no model that the row of {family!r} fits: {fault}.")
    raise ValueError(
        f"No architecture row for model_type {family!r}, and the generic row does not hold: {fault}. Add a row to "
        "probes/model/families.py; the tests then check it."
    )


def broken_identity(model: PreTrainedModel) -> str | None:
    """The first identity that the model's row breaks, in words; None where all hold.

    In every layer: the stream adds up, each summand with factor one; a parallel block's attention and MLP read the
    same; the heads' writes and the bias are what `o_proj` puts out, and it reads `z`. The final norm of the last
    `resid_post` is `hidden_states[-1]`, and the streams before are the other `hidden_states`. A head's query moves its
    own slice of `z` alone, in the first layer of each width. Short forward passes of random tokens. What is added to
    the stream is measured against itself, not against the stream: an error is what dtype's rounding does not explain.

    >>> from probes.model import broken_identity, load
    >>> broken_identity(load("organism")) is None
    True
    """
    row = architecture_of(model)
    for path in (row.layers, row.final_norm):
        if _missing(model, path):
            return f"the model has no {path}"
    for layer, block in enumerate(model.get_submodule(row.layers).children()):
        for path in dict.fromkeys((row.o_proj, *(tap.path for tap in row.taps.values()))):
            if path and _missing(block, path) and not (is_parallel(model) and path == row.taps["resid_mid"].path):
                return f"a block has no {path}"
        try:
            own_weight(o_proj_of(model, layer), f"{row.o_proj} of layer {layer}")
        except ValueError as error:
            return str(error).removesuffix(".")
        width, heads = width_of(model, Site(layer, "z")), n_heads(model, layer)
        if width % heads:
            return f"o_proj of layer {layer} reads {width} channels, which {heads} heads do not divide"
    with torch.no_grad():
        return next(_broken(model, row), None)


def _broken(model: PreTrainedModel, row: Architecture) -> Iterator[str]:
    names = [name for name in _READ if not (name == "resid_mid" and is_parallel(model))]
    sites = [Site(layer, name) for layer in range(n_layers(model)) for name in names]
    ids = _random_ids(model)
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
        if site.name != "mlp_in" and cache[site].shape != (*_SHAPE, width_of(model, site)):  # some MLPs take rows flat
            yield f"{site} is no [batch, position, {width_of(model, site)}], but {list(cache[site].shape)}"
            return
    for layer in range(n_layers(model)):
        x = {name: cache[Site(layer, name)] for name in names}
        for whole, parts in _PARALLEL if is_parallel(model) else _SEQUENTIAL:
            if not _adds_up(x[whole], [x[part].to(x[whole].device) for part in parts]):
                yield f"{whole} = {' + '.join(parts)} does not hold in layer {layer}"
        if is_parallel(model) and not _close(x["mlp_in"], _mlp_would_read(model, row, layer, x)):
            yield f"attention and MLP do not read the same stream in layer {layer}"
        if row.attn_norm is None and not _heads_add_up(model, layer, x["z"].float(), x["attn_out"].float()):
            yield f"the heads of layer {layer} do not add up to its attn_out"
        if layer and not _close(x["resid_pre"], hidden[layer]):
            yield f"L{layer}.resid_pre is not hidden_states[{layer}]"
    last = model.get_submodule(row.final_norm)(cache[Site(n_layers(model) - 1, "resid_post")])
    if not _close(last, hidden[-1]):
        yield f"{row.final_norm} of the last resid_post is not hidden_states[-1]"
    widths = {(width_of(model, Site(layer, "z")), n_heads(model, layer)): layer for layer in range(n_layers(model))}
    yield from (fault for layer in widths.values() if (fault := _mixed_heads(model, row, layer)) is not None)


def _mlp_would_read(model: PreTrainedModel, row: Architecture, layer: int, x: dict[SiteName, Tensor]) -> Tensor:
    """What a parallel block's MLP reads: the block's stream by its own norm, or what attention reads."""
    block, path = model.get_submodule(f"{row.layers}.{layer}"), row.taps["resid_mid"].path
    if _missing(block, path):
        return x["attn_in"]
    out: Tensor = block.get_submodule(path)(x["resid_pre"])
    return out


def _heads_add_up(model: PreTrainedModel, layer: int, z: Tensor, attn_out: Tensor) -> bool:
    bias, matrices = o_proj_bias(model, layer), head_matrices(model, layer).float()
    writes = torch.einsum("bphk,dhk->bpd", z.unflatten(-1, (n_heads(model, layer), -1)), matrices)
    return _close(attn_out, (writes if bias is None else writes + bias.float()) * multiplier_of(model))


def _mixed_heads(model: PreTrainedModel, row: Architecture, layer: int) -> str | None:
    """A head's queries, their sign turned (which no norm over all heads sees), change the head's slice of z alone."""
    attention = model.get_submodule(f"{row.layers}.{layer}.{row.o_proj.rpartition('.')[0]}")
    query = next((module for name in _QUERIES if (module := getattr(attention, name, None)) is not None), None)
    heads = n_heads(model, layer)
    if heads == 1 or not isinstance(query, nn.Linear) or query.out_features % heads:
        return None

    def turned(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        by_head: Tensor = output.unflatten(-1, (heads, -1)).clone()
        by_head[..., 0, :] *= -1
        out: Tensor = by_head.flatten(-2)
        return out

    ids, site = _random_ids(model), Site(layer, "z")
    with captured(model, [site]) as plain:
        model(input_ids=ids, use_cache=False)
    with captured(model, [site]) as changed, hooked(model, query, turned, side="output", place=f"queries of {layer}"):
        model(input_ids=ids, use_cache=False)
    before, after = (cache[site].float().unflatten(-1, (heads, -1)) for cache in (plain, changed))
    if _close(after[..., 1:, :], before[..., 1:, :]):
        return None
    return f"a head's queries in layer {layer} change what other heads write"


def _adds_up(whole: Tensor, parts: list[Tensor]) -> bool:
    """Is `whole` the sum, each part with factor one? By the part's own size, and what rounding may leave."""
    rest = whole.double() - torch.stack([part.double() for part in parts]).sum(0)
    rounding = torch.finfo(whole.dtype).eps * float(whole.double().norm())  # an addition leaves half of it at most
    norms = [float(part.double().norm()) for part in parts]
    factors = (
        float((rest * part.double()).sum()) / max(norm, 1e-30) ** 2 for part, norm in zip(parts, norms, strict=True)
    )
    # Rounding is no friend of any one part, so of a factor it moves only what chance allows.
    slack = (1e-2 + 2 * rounding / max(norm, 1e-30) / whole.numel() ** 0.5 for norm in norms)
    within = all(abs(factor) < most for factor, most in zip(factors, slack, strict=True))
    return within and float(rest.norm()) < rounding + 1e-2 * min(norms)


def _close(left: Tensor, right: Tensor) -> bool:
    """Equal but for rounding in the model's dtype (at most bfloat16's)."""
    if left.shape != right.shape:
        return False
    left, right = left.float(), right.float().to(left.device)
    return float((left - right).norm()) <= 2e-2 * float(left.norm())


def _random_ids(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config_of(model).vocab_size, _SHAPE, generator=generator).to(model.device)


def _decoder(model: PreTrainedModel) -> str | None:
    """The name of the text decoder inside the model, where it has one."""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder and name), None)


def _inside(row: Architecture, decoder: str) -> Architecture:
    """The row, its decoder under another name."""
    layers, norm = (path.partition(".")[2] for path in (row.layers, row.final_norm))
    return replace(row, layers=f"{decoder}.{layers}", final_norm=f"{decoder}.{norm}")


def _missing(module: nn.Module, path: str) -> bool:
    return path not in dict(module.named_modules())
