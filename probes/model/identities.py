"""What must hold of a model if its sites are where its row says; checked at load where no row names the family."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.model.architectures import (
    architecture_of,
    config_of,
    head_matrices,
    is_parallel,
    n_heads,
    n_layers,
    o_proj_bias,
    o_proj_of,
)
from probes.model.families import GENERIC, Architecture
from probes.model.hooks import captured
from probes.model.sites import Site, SiteName

_SEQUENTIAL: tuple[tuple[SiteName, tuple[SiteName, ...]], ...] = (
    ("resid_mid", ("resid_pre", "attn_out")),
    ("resid_post", ("resid_mid", "mlp_out")),
)
_PARALLEL: tuple[tuple[SiteName, tuple[SiteName, ...]], ...] = (("resid_post", ("resid_pre", "attn_out", "mlp_out")),)
_READ: tuple[SiteName, ...] = (
    "resid_pre", "resid_mid", "resid_post", "attn_in", "attn_out", "mlp_in", "mlp_out", "z",
)  # fmt: skip


def adopt(model: PreTrainedModel) -> None:
    """Give a model of an unlisted family the first generic row whose identities hold on a short forward pass.

    Raises ValueError, naming the identity that broke, where none holds: a wrong place is never read in silence.
    """
    broken = []
    for row in GENERIC:
        setattr(model, "_thinksteer_row", row)
        fault = broken_identity(model)
        if fault is None:
            return
        broken.append(fault)
    del model._thinksteer_row
    raise ValueError(
        f"No architecture row for model_type {config_of(model).model_type!r}, and the generic row does not hold: "
        f"{broken[0]}. Add a row to probes/model/families.py; the tests then check it."
    )


def broken_identity(model: PreTrainedModel) -> str | None:
    """The first identity that the model's row breaks, in words; None where all hold.

    In every layer: the stream adds up; a parallel block's attention and MLP read the same; the heads' writes and the
    bias are what `o_proj` puts out, and it reads `z`. The final norm of the last `resid_post` is
    `hidden_states[-1]`, and the streams before are the other `hidden_states`. One short forward pass of random
    tokens; equal means within 2 % in norm, bfloat16's rounding.

    >>> from probes.model import broken_identity, load
    >>> broken_identity(load("organism")) is None
    True
    """
    row = architecture_of(model)
    for path in (row.layers, row.final_norm):
        if _missing(model, path):
            return f"the model has no {path}"
    for block in model.get_submodule(row.layers).children():
        for path in dict.fromkeys((row.o_proj, *(tap.path for tap in row.taps.values()))):
            if path and _missing(block, path) and not (is_parallel(model) and path == row.taps["resid_mid"].path):
                return f"a block has no {path}"
    width = o_proj_of(model, 0).get_parameter("weight").shape[1]
    if width % n_heads(model):
        return f"o_proj reads {width} channels, which {n_heads(model)} heads do not divide"
    with torch.no_grad():
        return next(_broken(model, row), None)


def _broken(model: PreTrainedModel, row: Architecture) -> Iterator[str]:
    names = [name for name in _READ if not (name == "resid_mid" and is_parallel(model))]
    sites = [Site(layer, name) for layer in range(n_layers(model)) for name in names]
    vocabulary = config_of(model).vocab_size
    ids = torch.randint(vocabulary, (2, 5), generator=torch.Generator().manual_seed(0)).to(model.device)
    with captured(model, sites) as cache:
        hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    if len(cache) < len(sites):
        yield f"{next(str(site) for site in sites if site not in cache)} was never reached"
        return
    for layer in range(n_layers(model)):
        x = {name: cache[Site(layer, name)].float() for name in names}
        for whole, parts in _PARALLEL if is_parallel(model) else _SEQUENTIAL:
            if not _close(x[whole], torch.stack([x[part].to(x[whole].device) for part in parts]).sum(0)):
                yield f"{whole} = {' + '.join(parts)} does not hold in layer {layer}"
        if is_parallel(model) and not _close(x["mlp_in"], x["attn_in"]):
            yield f"attention and MLP do not read the same stream in layer {layer}"
        if row.attn_norm is None:
            bias, width = o_proj_bias(model, layer), head_matrices(model, layer).shape[1:].numel()
            if x["z"].shape[-1] != width:
                yield f"z of layer {layer} has {x['z'].shape[-1]} channels, but o_proj reads {width}"
                return
            z = x["z"].unflatten(-1, (n_heads(model), -1))
            writes = torch.einsum("bphk,dhk->bpd", z, head_matrices(model, layer).float())
            if not _close(x["attn_out"], writes if bias is None else writes + bias.float()):
                yield f"the heads of layer {layer} do not add up to its attn_out"
        if layer and not _close(x["resid_pre"], hidden[layer].float()):
            yield f"L{layer}.resid_pre is not hidden_states[{layer}]"
    last = model.get_submodule(row.final_norm)(cache[Site(n_layers(model) - 1, "resid_post")])
    if not _close(last.float(), hidden[-1].float()):
        yield f"{row.final_norm} of the last resid_post is not hidden_states[-1]"


def _close(left: Tensor, right: Tensor) -> bool:
    """Equal but for rounding in the model's dtype (at most bfloat16's)."""
    return left.shape == right.shape and float((left - right.to(left.device)).norm() / left.norm()) < 2e-2


def _missing(module: nn.Module, path: str) -> bool:
    return path not in dict(module.named_modules())
