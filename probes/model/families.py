"""One row for each model family: where its sites are. A new family is a new row, and no new code."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from probes.model.sites import SiteName


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
    the config key that gives `o_proj` a bias. `centred` tells a final norm that takes the mean out, `differential`
    attention whose heads are pairs of those the config counts, `normed` that what goes on in the stream is what the
    norms put out, times a number; what stands at the sites that are `overwritten` is changed in place later on. A block
    has the sites that `taps` name, and heads if there is an `o_proj`; where blocks differ, as in a hybrid, `blocks` is
    a row for each, and the row itself that of the first with heads.

    >>> from probes.model import architecture_of, load
    >>> row = architecture_of(load("organism"))
    >>> row.layers, row.final_norm, row.o_proj
    ('model.layers', 'model.norm', 'self_attn.o_proj')
    >>> row.taps["z"]
    Tap(path='self_attn.o_proj', side='input')
    >>> row.attn_norm, row.parallel  # no norm between o_proj and the stream; attention before the MLP, not beside it
    (None, None)
    """

    taps: Mapping[SiteName, Tap]
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    o_proj: str | None = "self_attn.o_proj"
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
    differential: bool = False
    normed: bool = False
    overwritten: frozenset[SiteName] = frozenset()
    blocks: tuple["Architecture", ...] = ()

    def at(self, layer: int) -> "Architecture":
        """The row of one block."""
        return self.blocks[layer] if self.blocks else self


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
GPT_OSS = replace(
    PRE_NORM,
    mlp_writers=("mlp.experts.down_proj",),
    expert_biases=("mlp.experts.down_proj_bias",),
    input_first=("mlp.experts.down_proj",),
)
BIASED, SPARSE_BIASED = (replace(row, declares_bias="attention_bias") for row in (PRE_NORM, SPARSE))
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
    "diffllama": replace(PRE_NORM, differential=True),
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
