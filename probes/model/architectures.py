"""What a loaded model is made of, asked of its family's row: blocks, heads, matrices, widths, paths of sites."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig

from probes.model.families import ARCHITECTURES, Architecture, Tap
from probes.model.placing.neighbours import unbridged
from probes.model.quantised import computed_weight, device_of, numbers_of, own_weight
from probes.model.sites import SITE_NAMES, Site, SiteName
from probes.words import checked


def config_of(model: nn.Module) -> PretrainedConfig:
    """The config of the text decoder."""
    config = model.config
    assert isinstance(config, PretrainedConfig)
    return config.get_text_config()


def architecture_of(model: nn.Module) -> Architecture:
    """The row of the model's family, or the row that `load` found to hold.

    Raises ValueError, naming the families we know, where there is neither.

    >>> from probes import load
    >>> from probes.model import architecture_of
    >>> row = architecture_of(load("organism"))
    >>> row.layers, row.o_proj
    ('model.layers', 'self_attn.o_proj')
    >>> row.taps["resid_mid"]
    Tap(path='post_attention_layernorm', side='input')
    """
    row: Architecture | None = model.__dict__.get("_thinksteer_row")  # which `load` looked up
    if row is not None:
        return row
    model_type = config_of(model).model_type
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"No architecture row for model_type {model_type!r}. Known: {', '.join(sorted(ARCHITECTURES))}. "
            "probes.load looks for the row of an unlisted family; or add one to probes/model/families.py."
        )
    return ARCHITECTURES[model_type]


def row_at(model: nn.Module, layer: int) -> Architecture:
    """The row of one block."""
    return architecture_of(model).at(layer)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """All decoder blocks, in order."""
    return cast("nn.ModuleList", model.get_submodule(architecture_of(model).layers))


def n_layers(model: nn.Module) -> int:
    """How many decoder blocks the model has.

    >>> from probes import load
    >>> from probes.model import n_layers
    >>> n_layers(load("organism"))
    4
    """
    return len(blocks_of(model))


def n_heads(model: nn.Module, layer: int | None = None) -> int:
    """Attention heads of a layer: as its attention counts them, else as the config does; the most of any, of none.

    A head is what writes its own slice of `z`: in differential attention that is a pair of the config's heads. A layer
    without attention (a state space, a convolution, linear attention) has 0.

    >>> from probes import load
    >>> from probes.model import n_heads
    >>> model = load("organism")
    >>> n_heads(model), n_heads(model, 0)
    (8, 8)
    """
    if layer is None:
        return max(n_heads(model, one) for one in range(n_layers(model)))
    row = row_at(model, layer)
    if row.o_proj is None:
        return 0
    attention = block_of(model, layer).get_submodule(row.o_proj.rpartition(".")[0])
    counted = getattr(attention, "num_heads", None)
    heads = int(counted if isinstance(counted, int) else config_of(model).num_attention_heads)
    return heads // 2 if row.differential else heads


def block_of(model: nn.Module, layer: int) -> nn.Module:
    """Decoder block `layer`. Raises IndexError, naming the layers there are, where it is out of range."""
    blocks = blocks_of(model)
    if not 0 <= layer < len(blocks):
        raise IndexError(f"Layer {layer} is out of range: the model has layers 0 to {len(blocks) - 1}.")
    return blocks[layer]


def layers_with_heads(model: nn.Module) -> list[int]:
    """All but those whose mixer is no attention."""
    return [layer for layer in range(n_layers(model)) if row_at(model, layer).o_proj is not None]


def check_heads(model: nn.Module, site: Site) -> None:
    """Raise ValueError where the site's layer has no heads, IndexError where it has not the one that is named."""
    o_proj_of(model, site.layer)
    if site.head is not None and not site.head < n_heads(model, site.layer):
        last = n_heads(model, site.layer) - 1
        raise IndexError(f"Head {site.head} is out of range: layer {site.layer} has heads 0 to {last}.")


def path_of_o_proj(model: nn.Module, layer: int) -> str:
    """Where it is in its block. Raises ValueError, naming the layers that have heads, where this one has none."""
    path = row_at(model, layer).o_proj
    if path is None:
        block_of(model, layer)
        able = ", ".join(str(one) for one in layers_with_heads(model))
        raise ValueError(
            f"Layer {layer} of this {config_of(model).model_type} has no attention heads that can be told apart. "
            + (f"The layers that have: {able}." if able else "No layer has.")
        )
    return path


def o_proj_of(model: nn.Module, layer: int) -> nn.Module:
    """The output projection of attention: a Linear, or GPT-2's Conv1D."""
    return unbridged(block_of(model, layer).get_submodule(path_of_o_proj(model, layer)))


def device_at(model: nn.Module, layer: int) -> torch.device:
    """Where a block computes."""
    parts = block_of(model, layer).modules()
    return device_of(next(part for part in parts if any(True for _ in part.parameters(recurse=False))))


def o_proj_bias(model: nn.Module, layer: int) -> nn.Parameter | None:
    return dict(o_proj_of(model, layer).named_parameters()).get("bias")


def output_first(row: Architecture, path: str, weight: Tensor) -> Float[Tensor, "*experts d_out d_in"]:
    """The matrix at `path` of a block as `[d_out, d_in]`, whichever way it is stored: a view."""
    return weight.mT if path in row.input_first else weight


def head_matrices(model: nn.Module, layer: int) -> Float[Tensor, "d_model n_heads d_head"]:
    """`o_proj`'s weight, head by head: a view. d_head is d_in / n_heads, whatever the config says.

    Where the weight is quantised, a float32 copy of what the module computes. Raises ValueError where an adapter or
    another thing is around it.
    """
    module, path = o_proj_of(model, layer), path_of_o_proj(model, layer)
    stored = own_weight(module, f"{path} of layer {layer}")
    weight = computed_weight(module) if stored is None else output_first(row_at(model, layer), path, stored)
    by_head: Tensor = weight.unflatten(1, (n_heads(model, layer), -1))
    return by_head


def width_of(model: nn.Module, site: Site) -> int:
    """How many numbers an activation has at a site, whatever the dtype of the weights.

    d_head at `z` of a head, n_heads * d_head at `z`, else d_model.

    >>> from probes import Site, load
    >>> from probes.model import width_of
    >>> model = load("organism")
    >>> [width_of(model, Site.parse(name)) for name in ("L0.resid_post", "L0.z", "L0H7.z", "L0H7.result")]
    [96, 128, 16, 96]
    """
    if row_at(model, site.layer).o_proj is None and site.name not in ("z", "result"):
        return int(config_of(model).hidden_size)
    module = o_proj_of(model, site.layer)
    names = ("nx", "nf") if hasattr(module, "nf") else ("in_features", "out_features")  # Conv1D, Linear
    d_in, d_model = (getattr(module, name) for name in names)
    if site.name != "z":
        return int(d_model)
    return int(d_in if site.head is None else d_in // n_heads(model, site.layer))


def multiplier_of(model: nn.Module) -> float:
    """What scales the output of attention and MLP before it is added to the stream: 1 but in Granite."""
    key = architecture_of(model).multiplier
    return 1.0 if key is None else float(getattr(config_of(model), key))


def is_parallel(model: nn.Module) -> bool:
    """Do attention and MLP read the same stream, so that there is none between them?"""
    key = architecture_of(model).parallel
    return key == "always" or (key is not None and bool(getattr(config_of(model), key)))


def attn_gain(model: nn.Module, layer: int) -> Float[Tensor, " d_model"] | None:
    """The gain of the norm between `o_proj` and the stream; None where there is no norm."""
    row = row_at(model, layer)
    if row.attn_norm is None:
        return None
    return _gain(block_of(model, layer).get_submodule(row.attn_norm), row)


def final_norm_of(model: nn.Module, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """A direction as the unembedding sees it: through the final norm, but for its scale and its bias."""
    row = architecture_of(model)
    if not row.final_norm:
        return vector
    gain = _gain(model.get_submodule(row.final_norm), row)
    vector = vector.to(gain.device)
    return gain * (vector - vector.mean() if row.centred else vector)


def tap_of(model: nn.Module, site: Site) -> tuple[nn.Module, Tap]:
    """The module, and the side of it, where `site` is in this model."""
    taps = row_at(model, site.layer).taps
    if site.name == "resid_mid" and is_parallel(model):
        raise ValueError(
            f"{config_of(model).model_type} has no resid_mid: attention and MLP read the same stream, and both are "
            "added to it at once. Read resid_pre, attn_out or resid_post."
        )
    if site.name in ("pattern", "z", "result"):
        check_heads(model, site)
    if site.name == "pattern":
        raise ValueError(
            f"{site} is who attends to whom, which is never held whole: read what a span gets of it with "
            "probes.activations.span_attention, and scale that with steer.Attend."
        )
    if site.name == "routing":
        raise ValueError(f"{site} is no activation but a router's choice: read it with probes.activations.experts.")
    if site.name == "result" and site.head is None:
        raise ValueError(f"{site} needs a head: write L{site.layer}H0.result.")
    block = block_of(model, site.layer)
    if site.name not in taps:
        have = ", ".join(name for name in SITE_NAMES if name in taps)
        raise ValueError(
            f"Layer {site.layer} of this {config_of(model).model_type} has no {site.name}: no module of its block "
            f"reads it or puts it out. It has {have}."
        )
    tap = taps[site.name]
    return block.get_submodule(tap.path), tap


def has_site(model: nn.Module, layer: int, name: SiteName) -> bool:
    """Is there an activation of that name in the layer?"""
    return name in row_at(model, layer).taps and not (name == "resid_mid" and is_parallel(model))


def path_of(model: nn.Module, site: Site) -> str:
    """The Hugging Face module path whose input or output (`tap_of`) is `site`.

    Raises ValueError where the family has no such site, IndexError where layer or head is out of range.

    >>> from probes.model import Site, load, path_of
    >>> model = load("organism")
    >>> path_of(model, Site(2, "attn_out")), path_of(model, Site(2, "resid_mid"))
    ('model.layers.2.self_attn', 'model.layers.2.post_attention_layernorm')
    """
    _, tap = tap_of(model, site)
    return ".".join(part for part in (architecture_of(model).layers, str(site.layer), tap.path) if part)


def site_of(model: nn.Module, text: str) -> Site:
    """Read a site from our name, TransformerLens' name, or a Hugging Face path, whose output is meant.

    Raises ValueError, naming the outputs that are sites, where it is none of these.

    >>> from probes.model import load, site_of
    >>> model = load("organism")
    >>> [str(site_of(model, text)) for text in ("L2.attn_out", "blocks.2.hook_attn_out", "model.layers.2.self_attn")]
    ['L2.attn_out', 'L2.attn_out', 'L2.attn_out']
    """
    row = architecture_of(model)
    if not text.startswith(row.layers + "."):
        return Site.parse(text)
    layer, _, path = text[len(row.layers) + 1 :].partition(".")
    row = row.at(int(layer)) if layer.isdigit() and int(layer) < n_layers(model) else row
    names = [name for name, tap in row.taps.items() if tap == Tap(path, "output") and name != "result"]
    if not layer.isdigit() or not names:
        known = ", ".join(sorted({tap.path or "(block)" for tap in row.taps.values() if tap.side == "output"}))
        raise ValueError(f"The output of {text!r} is not a site. In a block of this family these are: {known}.")
    return Site(int(layer), names[0])


@checked
def sites_in(model: nn.Module, name: SiteName) -> list[Site]:
    """The site of that name in every layer that has it. Raises ValueError, saying why, where none has.

    >>> from probes.model import load, sites_in
    >>> [str(site) for site in sites_in(load("organism"), "resid_post")]
    ['L0.resid_post', 'L1.resid_post', 'L2.resid_post', 'L3.resid_post']
    """
    sites = [Site(layer, name) for layer in range(n_layers(model))]
    found = [site for site in sites if name == "routing" or has_site(model, site.layer, name)]
    if not found:
        tap_of(model, sites[0])
    return found


def _gain(norm: nn.Module, row: Architecture) -> Tensor:
    weight = numbers_of(unbridged(norm))
    assert weight is not None
    return weight.detach().float() + row.gain_offset
