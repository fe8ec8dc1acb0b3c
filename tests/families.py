"""Tiny random models, one for each family, with a tokenizer that thinks. No downloads; built in milliseconds."""

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from probes.model.loading import load
from probes.model.routers import block_at, moe_layers

D_VOCAB, N_LAYERS = 97, 3
BASE = {
    "vocab_size": D_VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.15,  # logits of a size that shows mistakes
}  # fmt: skip
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "llama": {},
    "llama+bias": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {"residual_multiplier": 0.3, "attention_bias": True},
    "cohere2": {"attention_bias": True},
    "glm4": {"head_dim": 16, "attention_bias": True},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_neox+sequential": {"use_parallel_residual": False},
    "gpt_oss": {
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": SPARSE | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": SPARSE | {"head_dim": 16, "mlp_only_layers": [0]},
    "deepseek_v3": {
        "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    },
}  # fmt: skip
# Sparse families without a row: it is found, and their routers are read.
UNLISTED_MOE = {
    "glm4_moe": SPARSE | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
                          "first_k_dense_replace": 1, "head_dim": 8},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}  # fmt: skip
POST_NORM = ("gemma2", "gemma3_text", "olmo2", "glm4")
PARALLEL = ("cohere2", "gpt_neox")
MOE = ("gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<bos> {{ m['content'] }} "
    "{% else %}? {{ m['content'] }} <eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}?{% if open_thinking is defined and open_thinking %} <think>{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %} <think> </think>{% endif %}{% endif %}"
)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "?")


def build(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A loaded tiny model of the family, `+bias` for its biased variant."""
    torch.manual_seed(seed)
    own: Any = {**FAMILIES, **UNLISTED_MOE}[family]
    config = AutoConfig.for_model(family.split("+")[0], **{**BASE, **own})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():  # zero biases and unit norms would hide mistakes
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return load(model.to(dtype), tokenizer=build_tokenizer())


def build_sparse(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A model whose routers choose by what they read, and not by their biases alone."""
    model = build(family, seed=seed)
    for layer in moe_layers(model):
        block_at(model, layer).router.get_parameter("weight").data *= 12
    return model


def build_tokenizer(words: tuple[str, ...] = SPECIAL, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a word: the special ones, then w6, w7 ... up to the vocabulary's size."""
    vocabulary = [*words, *(f"w{i}" for i in range(len(words), D_VOCAB))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.chat_template = template
    return tokenizer
