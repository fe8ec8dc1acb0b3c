"""What a model's generation config says of how tokens are chosen: what is honoured, and what is named as left out."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

# Honoured by transformers, whose processors change scores before any draw; what is drawn by, `Sampling.of` reads.
HONOURED = (
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens",
    "exponential_decay_length_penalty", "remove_invalid_values", "renormalize_logits",
)  # fmt: skip
# Left out: other draws, other strategies than a draw a token, other ends; each with what it is when it is off.
LEFT_OUT: dict[str, Any] = {
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None, "num_beams": 1, "num_beam_groups": 1,
    "diversity_penalty": 0.0, "constraints": None, "force_words_ids": None, "penalty_alpha": None, "dola_layers": None,
    "prompt_lookup_num_tokens": None, "assistant_early_exit": None, "use_mtp": None, "speculation_type": None,
    "num_return_sequences": 1, "guidance_scale": 1.0, "watermarking_config": None, "stop_strings": None,
    "max_time": None, "token_healing": False, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0,
}  # fmt: skip


def honoured(model: PreTrainedModel) -> dict[str, Any]:
    """The settings that change scores before a draw, as far as the model has them."""
    own = model.generation_config
    found = {} if own is None else {name: getattr(own, name, None) for name in HONOURED}
    off = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0}
    return {name: value for name, value in found.items() if value not in (None, False, off.get(name))}


# Of those honoured: they ask how many tokens the batch has, and not the row.
_STEPS = {
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens",
    "exponential_decay_length_penalty",
}  # fmt: skip


def counts_steps(model: PreTrainedModel) -> bool:
    """Has the model a setting that counts the steps of a batch, so that its rows have to begin together?"""
    return not _STEPS.isdisjoint(honoured(model))


@contextmanager
def one_draw_a_token(model: PreTrainedModel) -> Iterator[None]:
    """While open, the model's own config has none of `LEFT_OUT`, which transformers would take up; it warns of them."""
    own: Any = model.generation_config
    found = {} if own is None else {name: getattr(own, name, None) for name in LEFT_OUT}
    left = {name: value for name, value in found.items() if value is not None and value != LEFT_OUT[name]}
    if not left:
        yield
        return
    words = ", ".join(f"{name}={value!r:.60}" for name, value in left.items())
    warnings.warn(
        f"The generation config of {model.config._name_or_path or type(model).__name__!r} sets {words}, which is left "
        "out: tokens are drawn one by one, by temperature, top_p, top_k and min_p.",
        stacklevel=4,
    )
    assert own is not None
    plain = deepcopy(own)
    for name in left:
        setattr(plain, name, None)
    model.generation_config = plain
    try:
        yield
    finally:
        model.generation_config = own


class NumbersOnly(LogitsProcessor):
    """Notes, on the device, which rows had scores that are not numbers: from them any token would be drawn."""

    def __init__(self) -> None:
        self.bad: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        bad = scores.isnan().any(1)
        self.bad = bad if self.bad is None else self.bad | bad
        return scores

    def check(self, names: list[str]) -> None:
        """Raises ValueError, naming the first of the rows."""
        if self.bad is not None and bool(self.bad.any()):
            first = names[int(torch.nonzero(self.bad)[0])]
            raise ValueError(
                f"The model's scores for the prompt {first[:60]!r} are not numbers (NaN), so no token can be drawn: a "
                "strength may be too large for its dtype, or the weights are broken."
            )
