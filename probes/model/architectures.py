"""One row for each model family: where its sites are. A new family is a new row, and no new code."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig

from probes.model.quantised import computed_weight, is_packed
from probes.model.sites import Site, SiteName


@dataclass(frozen=True)
class Tap:
    """A side of a submodule of a decoder block; `path=""` is the block itself."""

    path: str
    side: Literal["input", "output"]


@dataclass(frozen=True)
class Architecture:
    """Where a Hugging Face decoder keeps what we read and write.

    `mlp_writers` are the matrices that write `mlp_out`, `expert_biases` what is added after them; a block has those
    that it has, as a sparse family may keep some blocks dense. `input_first` names the matrices stored
    `[d_in, d_out]`. `attn_norm` and `mlp_norm` name a norm between the writers and the stream (its gain is
    `gain_offset` + weight); nothing folds at `attn_out` or `mlp_out` where there is one. `multiplier` is the config
    key that scales what is added to the stream. `parallel` is the config key under which attention and MLP read one
    stream, so that there is no `resid_mid`; `"always"` where they do in every model of the family. `declares_bias` is
    the config key that gives `o_proj` a bias. `centred` tells a final norm that takes the mean out.
    """

    taps: Mapping[SiteName, Tap]
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    o_proj: str = "self_attn.o_proj"
    mlp_writers: tuple[str, ...] = ("mlp.down_proj",)
    expert_biases: tuple[str, ...] = ()
    input_first: tuple[str, ...] = ()
    attn_norm: str | None = None
    mlp_norm: str | None = None
    gain_offset: float = 0.0
    multiplier: str | None = None
    parallel: str | None = None
    declares_bias: str | None = None
    centred: bool = False


PRE_NORM = Architecture(
    taps={
        "resid_pre": Tap("", "input"),
        "resid_mid": Tap("post_attention_layernorm", "input"),
        "resid_post": Tap("", "output"),
        "attn_in": Tap("self_attn", "input"),
        "attn_out": Tap("self_attn", "output"),
        "mlp_in": Tap("mlp", "input"),
        "mlp_out": Tap("mlp", "output"),
        "z": Tap("self_attn.o_proj", "input"),
        "result": Tap("self_attn.o_proj", "output"),
    },
)
SANDWICH_NORM = replace(
    PRE_NORM,
    taps={
        **PRE_NORM.taps,
        "resid_mid": Tap("pre_feedforward_layernorm", "input"),
        "attn_out": Tap("post_attention_layernorm", "output"),
        "mlp_out": Tap("post_feedforward_layernorm", "output"),
    },
    attn_norm="post_attention_layernorm",
    mlp_norm="post_feedforward_layernorm",
    declares_bias="attention_bias",
)
GEMMA = replace(SANDWICH_NORM, gain_offset=1.0)
POST_NORM = replace(SANDWICH_NORM, taps={**SANDWICH_NORM.taps, "resid_mid": Tap("mlp", "input")})
SPARSE = replace(
    PRE_NORM,
    mlp_writers=(
        "mlp.down_proj",
        "mlp.experts.down_proj",
        "mlp.shared_expert.down_proj",
        "mlp.shared_experts.down_proj",
    ),
)
BIASED, SPARSE_BIASED = (replace(row, declares_bias="attention_bias") for row in (PRE_NORM, SPARSE))
GPT_OSS = replace(
    PRE_NORM,
    mlp_writers=("mlp.experts.down_proj",),
    expert_biases=("mlp.experts.down_proj_bias",),
    input_first=("mlp.experts.down_proj",),
)
COHERE = replace(BIASED, parallel="always", centred=True)
GLM4 = replace(
    PRE_NORM,
    taps={
        **PRE_NORM.taps,
        "attn_out": Tap("post_self_attn_layernorm", "output"),
        "mlp_out": Tap("post_mlp_layernorm", "output"),
    },
    attn_norm="post_self_attn_layernorm",
    mlp_norm="post_mlp_layernorm",
)
GPT2 = Architecture(
    taps={
        "resid_pre": Tap("", "input"),
        "resid_mid": Tap("ln_2", "input"),
        "resid_post": Tap("", "output"),
        "attn_in": Tap("attn", "input"),
        "attn_out": Tap("attn", "output"),
        "mlp_in": Tap("mlp", "input"),
        "mlp_out": Tap("mlp", "output"),
        "z": Tap("attn.c_proj", "input"),
        "result": Tap("attn.c_proj", "output"),
    },
    layers="transformer.h",
    final_norm="transformer.ln_f",
    o_proj="attn.c_proj",
    mlp_writers=("mlp.c_proj",),
    input_first=("attn.c_proj", "mlp.c_proj"),
    centred=True,
)
GPT_NEOX = Architecture(
    taps={
        **PRE_NORM.taps,
        "attn_in": Tap("attention", "input"),
        "attn_out": Tap("attention", "output"),
        "z": Tap("attention.dense", "input"),
        "result": Tap("attention.dense", "output"),
    },
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    o_proj="attention.dense",
    mlp_writers=("mlp.dense_4h_to_h",),
    parallel="use_parallel_residual",
    declares_bias="attention_bias",
    centred=True,
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": BIASED,
    "mistral": PRE_NORM,
    "qwen2": PRE_NORM,
    "qwen3": BIASED,
    "phi3": PRE_NORM,
    "smollm3": BIASED,
    "granite": replace(BIASED, multiplier="residual_multiplier"),
    "cohere2": COHERE,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": POST_NORM,
    "glm4": GLM4,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "mixtral": SPARSE,
    "olmoe": SPARSE_BIASED,
    "qwen3_moe": SPARSE_BIASED,
    "qwen2_moe": SPARSE,
    "deepseek_v3": SPARSE_BIASED,
    "gpt_oss": GPT_OSS,
}
# What an unlisted family may look like; each is taken only if the identities hold (probes/model/identities.py).
GENERIC: tuple[Architecture, ...] = (
    replace(PRE_NORM, mlp_writers=()),
    replace(SANDWICH_NORM, mlp_writers=(), declares_bias=None),
    replace(POST_NORM, mlp_writers=(), declares_bias=None),
    replace(PRE_NORM, mlp_writers=(), parallel="always"),
)


def config_of(model: nn.Module) -> PretrainedConfig:
    """The config of the text decoder."""
    config = model.config
    assert isinstance(config, PretrainedConfig)
    return config.get_text_config()


def architecture_of(model: nn.Module) -> Architecture:
    """The row of the model's family, or the generic row that `load` found to hold.

    Raises ValueError, naming the families we know, where there is neither.
    """
    model_type = config_of(model).model_type
    row = ARCHITECTURES.get(model_type) or getattr(model, "_thinksteer_row", None)
    if row is None:
        raise ValueError(
            f"No architecture row for model_type {model_type!r}. Known: {', '.join(sorted(ARCHITECTURES))}. "
            "probes.load tries the generic row on an unlisted family; or add a row to probes/model/architectures.py."
        )
    return row


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """All decoder blocks, in order."""
    return cast("nn.ModuleList", model.get_submodule(architecture_of(model).layers))


def n_layers(model: nn.Module) -> int:
    return len(blocks_of(model))


def n_heads(model: nn.Module) -> int:
    return int(config_of(model).num_attention_heads)


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

    Where the weight is quantised, a float32 copy of what the module computes.
    """
    module = o_proj_of(model, layer)
    stored = module.get_parameter("weight")
    if is_packed(stored):
        weight = computed_weight(module)
    else:
        weight = output_first(model, architecture_of(model).o_proj, stored)
    by_head: Tensor = weight.unflatten(1, (n_heads(model), -1))
    return by_head


def width_of(model: nn.Module, site: Site) -> int:
    """How many numbers an activation has at a site, whatever the dtype of the weights."""
    module = o_proj_of(model, site.layer)
    names = ("nx", "nf") if hasattr(module, "nf") else ("in_features", "out_features")  # Conv1D, Linear
    d_in, d_model = (getattr(module, name) for name in names)
    if site.name != "z":
        return int(d_model)
    return int(d_in if site.head is None else d_in // n_heads(model))


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
    if site.head is not None and not site.head < n_heads(model):
        raise IndexError(f"Head {site.head} is out of range: the model has heads 0 to {n_heads(model) - 1}.")
    if site.name == "routing":
        raise ValueError(f"{site} is no activation but a router's choice: read it with probes.activations.experts.")
    if site.name == "result" and site.head is None:
        raise ValueError(f"{site} needs a head: write L{site.layer}H0.result.")
    tap = taps[site.name]
    return block_of(model, site.layer).get_submodule(tap.path), tap


def _gain(norm: nn.Module, row: Architecture) -> Tensor:
    weight = norm.get_parameter("weight").detach()
    return weight.float() + row.gain_offset
