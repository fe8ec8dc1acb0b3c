"""What a loaded model is made of, asked of its family's row: blocks, heads, matrices, widths, paths of sites."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig

from probes.model.families import ARCHITECTURES, Architecture, Tap
from probes.model.quantised import computed_weight, numbers_of, own_weight
from probes.model.sites import Site, SiteName
from probes.words import checked


def config_of(model: nn.Module) -> PretrainedConfig:
    """The config of the text decoder."""
    config = model.config
    assert isinstance(config, PretrainedConfig)
    return config.get_text_config()


def architecture_of(model: nn.Module) -> Architecture:
    """The row of the model's family, or the generic row that `load` found to hold.

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
            "probes.load tries the generic row on an unlisted family; or add a row to probes/model/families.py."
        )
    return ARCHITECTURES[model_type]


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

    A head is what writes its own slice of `z`: in differential attention that is a pair of the config's heads.

    >>> from probes import load
    >>> from probes.model import n_heads
    >>> model = load("organism")
    >>> n_heads(model), n_heads(model, 0)
    (8, 8)
    """
    if layer is None:
        return max(n_heads(model, one) for one in range(n_layers(model)))
    row = architecture_of(model)
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


def o_proj_of(model: nn.Module, layer: int) -> nn.Module:
    """The output projection of attention: a Linear, or GPT-2's Conv1D."""
    return block_of(model, layer).get_submodule(architecture_of(model).o_proj)


def o_proj_bias(model: nn.Module, layer: int) -> nn.Parameter | None:
    return dict(o_proj_of(model, layer).named_parameters()).get("bias")


def output_first(model: nn.Module, path: str, weight: Tensor) -> Float[Tensor, "*experts d_out d_in"]:
    """The matrix at `path` of a block as `[d_out, d_in]`, whichever way it is stored: a view."""
    return weight.mT if path in architecture_of(model).input_first else weight


def head_matrices(model: nn.Module, layer: int) -> Float[Tensor, "d_model n_heads d_head"]:
    """`o_proj`'s weight, head by head: a view. d_head is d_in / n_heads, whatever the config says.

    Where the weight is quantised, a float32 copy of what the module computes. Raises ValueError where an adapter or
    another thing is around it.
    """
    module, path = o_proj_of(model, layer), architecture_of(model).o_proj
    stored = own_weight(module, f"{path} of layer {layer}")
    weight = computed_weight(module) if stored is None else output_first(model, path, stored)
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


def rope_groups(model: nn.Module, lengths: Sequence[int], new: int = 0) -> list[list[int]]:
    """Which rows may share a batch, where rotary frequencies depend on its longest row: indices, in their order.

    With *longrope* (Phi-3) rows within the original context and rows beyond it have two sets of frequencies; with
    *dynamic* scaling rows beyond it have one for each length. A row that comes to pass the limit while `new` tokens are
    written shares a batch with rows of its own length alone, which pass it at the same step. One group where
    frequencies are fixed.
    """
    limits = _rope_limits(model)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, length in enumerate(lengths):
        regime = [
            0 if length + new <= limit else -1 if kind == "longrope" and length > limit else length
            for kind, limit in limits.items()
        ]
        groups.setdefault(tuple(regime), []).append(i)
    return list(groups.values())


def passes_rope_limit(model: nn.Module, longest: int) -> bool:
    """Does a row of so many tokens pass the length from which on rotary frequencies depend on the longest row?"""
    return any(longest > limit for limit in _rope_limits(model).values())


def _rope_limits(model: nn.Module) -> dict[str, int]:
    config = config_of(model)
    known: Any = getattr(config, "rope_parameters", None) or {}
    limits: dict[str, int] = {}
    for rope in (known, *known.values()):
        kind = rope.get("rope_type") if isinstance(rope, Mapping) else None
        if kind in ("longrope", "dynamic"):
            limits[kind] = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return limits


def check_room(model: nn.Module, longest: int, new: int = 0) -> None:
    """Raise ValueError where learned positions (GPT-2's) are fewer than the longest row and its `new` tokens."""
    learned = [
        module.num_embeddings
        for name, module in model.named_modules()
        if name.endswith((".wpe", ".embed_positions", ".position_embeddings")) and isinstance(module, nn.Embedding)
    ]
    if learned and longest + new > min(learned):
        asked = f"a row of {longest:,} tokens" + (f" and up to {new:,} new ones" if new else "")
        room = f" Set max_new_tokens to at most {min(learned) - longest:,}." if new and longest < min(learned) else ""
        raise ValueError(f"The model has positions for {min(learned):,} tokens, and no more, but {asked} came.{room}")


def attn_gain(model: nn.Module, layer: int) -> Float[Tensor, " d_model"] | None:
    """The gain of the norm between `o_proj` and the stream; None where there is no norm."""
    row = architecture_of(model)
    if row.attn_norm is None:
        return None
    return _gain(block_of(model, layer).get_submodule(row.attn_norm), row)


def final_norm_of(model: nn.Module, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """A direction as the unembedding sees it: through the final norm, but for its scale and its bias."""
    row = architecture_of(model)
    gain = _gain(model.get_submodule(row.final_norm), row)
    vector = vector.to(gain.device)
    return gain * (vector - vector.mean() if row.centred else vector)


def tap_of(model: nn.Module, site: Site) -> tuple[nn.Module, Tap]:
    """The module, and the side of it, where `site` is in this model."""
    taps = architecture_of(model).taps
    if site.name == "resid_mid" and is_parallel(model):
        raise ValueError(
            f"{config_of(model).model_type} has no resid_mid: attention and MLP read the same stream, and both are "
            "added to it at once. Read resid_pre, attn_out or resid_post."
        )
    if site.head is not None and not site.head < n_heads(model, site.layer):
        last = n_heads(model, site.layer) - 1
        raise IndexError(f"Head {site.head} is out of range: layer {site.layer} has heads 0 to {last}.")
    if site.name == "routing":
        raise ValueError(f"{site} is no activation but a router's choice: read it with probes.activations.experts.")
    if site.name == "result" and site.head is None:
        raise ValueError(f"{site} needs a head: write L{site.layer}H0.result.")
    tap = taps[site.name]
    return block_of(model, site.layer).get_submodule(tap.path), tap


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
    names = [name for name, tap in row.taps.items() if tap == Tap(path, "output") and name != "result"]
    if not layer.isdigit() or not names:
        known = ", ".join(sorted({tap.path or "(block)" for tap in row.taps.values() if tap.side == "output"}))
        raise ValueError(f"The output of {text!r} is not a site. In a block of this family these are: {known}.")
    return Site(int(layer), names[0])


@checked
def sites_in(model: nn.Module, name: SiteName) -> list[Site]:
    """The site of that name in every layer.

    >>> from probes.model import load, sites_in
    >>> [str(site) for site in sites_in(load("organism"), "resid_post")]
    ['L0.resid_post', 'L1.resid_post', 'L2.resid_post', 'L3.resid_post']
    """
    return [Site(layer, name) for layer in range(n_layers(model))]


def _gain(norm: nn.Module, row: Architecture) -> Tensor:
    weight = numbers_of(norm)
    assert weight is not None
    return weight.detach().float() + row.gain_offset
