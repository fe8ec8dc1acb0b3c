"""Every type of causal LM that transformers knows, built as small as its config lets it be."""

from typing import Any

import torch
from families import BASE, FAMILIES, UNLISTED_MOE
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
MOST_PARAMETERS = 100_000_000

# What a config calls its sizes. A key counts only where the config has it.
SIZES: dict[str, Any] = BASE | {
    "head_dim": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "moe_intermediate_size": 24,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 24, "expert_ffn_hidden_size": 24, "ffn_hidden_size": 48,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "state_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "num_kv_shared_layers": 0,
    "image_size": 32, "patch_size": 16, "depth": 1, "out_hidden_size": 32, "embed_dim": 32,
}  # fmt: skip
_MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
# What else a type must be told.
TOLD: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "gpt_neo": {"num_layers": 3, "attention_types": [[["global", "local", "global"], 1]], "num_heads": 4},
    "falcon": {"head_dim": None},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "nemotron_h": {"n_groups": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"v_head_dim": None},
    "xlnet": {"d_head": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba"], "mamba_headdim": 16, "n_mamba_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "qwen3_next": _MIXED, "qwen3_5": _MIXED, "qwen3_5_text": _MIXED, "qwen3_5_moe": _MIXED, "qwen3_5_moe_text": _MIXED,
    "kimi_linear": _MIXED, "bailing_hybrid": _MIXED,
}  # fmt: skip


def tiny_config(model_type: str) -> PretrainedConfig:
    """The smallest config of the type that we know to write."""
    kind = type(AutoConfig.for_model(model_type))
    told = TOLD.get(model_type, {}) | FAMILIES.get(model_type, {}) | UNLISTED_MOE.get(model_type, {})
    return kind(**{key: value for key, value in (_sizes(kind) | told).items() if value is not None})


def _sizes(kind: type[PretrainedConfig]) -> dict[str, Any]:
    default = kind()
    known = default.to_dict()
    own = {key: value for key, value in SIZES.items() if key in known or key in kind.attribute_map}
    if "qk_rope_head_dim" in own:  # there it is the rotated part, and follows
        own |= {"num_key_value_heads": own["num_attention_heads"]}
        own.pop("head_dim", None)
    for name, part in kind.sub_configs.items():
        if isinstance(part, type) and issubclass(part, PretrainedConfig) and part is not AutoConfig:
            own[name] = _sizes(part) | TOLD.get(part.model_type, {})
        elif getattr(default, name, None) is not None:
            inner = getattr(default, name)
            own[name] = {"model_type": inner.model_type, **_sizes(type(inner))}
    return own


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model of the type. Raises what transformers raises where it builds none, MemoryError for a large one."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise MemoryError(f"{size:,} parameters are the fewest that its config was told to have")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():  # zero biases and unit norms would hide mistakes
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model
