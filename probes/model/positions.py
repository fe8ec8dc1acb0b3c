"""Positions: how long a row may be, which rows may share a batch, how many tokens a cache holds, which are real."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probes.model.architectures import architecture_of, config_of


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
    beside = model.get_submodule(architecture_of(model).layers.rpartition(".")[0])  # of the blocks
    learned = [
        module.num_embeddings
        for name, module in beside.named_children()
        if name in ("wpe", "embed_positions", "position_embeddings") and isinstance(module, nn.Embedding)
    ]
    if learned and longest + new > min(learned):
        asked = f"a row of {longest:,} tokens" + (f" and up to {new:,} new ones" if new else "")
        room = f" Set max_new_tokens to at most {min(learned) - longest:,}." if new and longest < min(learned) else ""
        raise ValueError(f"The model has positions for {min(learned):,} tokens, and no more, but {asked} came.{room}")


class Length:
    """How many tokens a cache holds. A static one on a GPU counts there, and is asked only in passes of several tokens;
    between these the count is kept here. So it is for one of states alone (Mamba's), which does not count at all."""

    def __init__(self) -> None:
        self.cache: object = None
        self.n = 0

    def of(self, cache: Any, new: int) -> int:
        if cache is None:
            return 0
        held = self.n if self.cache is cache and new == 1 else None
        try:
            told = cache.get_seq_length()
        except ValueError:
            if self.cache is not cache and cache.has_previous_state():
                raise ValueError("A scope cannot tell how many tokens are in a cache of states alone: begin with an "
                                 "empty one.") from None  # fmt: skip
            told = self.n if self.cache is cache else 0
        on_device = isinstance(told, Tensor) and told.device.type != "cpu"
        n_past = held if on_device and held is not None else int(told)
        self.cache, self.n = cache, n_past + new
        return n_past


def real_tokens(mask: Any, ids: Int[Tensor, "batch new"], n_past: int) -> Int[Tensor, "batch total"] | None:
    """A mask whose last columns say which of the new tokens are real: the one that is given, or, of those made for a
    static cache, by what each token sees itself."""
    if isinstance(mask, Mapping):
        mask = next((mask[kind] for kind in ("full_attention", *mask) if mask.get(kind) is not None), None)
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return mask
    new = ids.shape[1]
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[3] < n_past + new:
        kind = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else f"the form of a {type(mask).__name__}"
        raise ValueError(
            f"A scope reads an attention mask [batch, pos], or one [batch, 1, new, pos] of a static cache, but this "
            f"one has {kind}: use the default, dynamic cache."
        )
    own = mask[:, 0].diagonal(offset=n_past, dim1=1, dim2=2)
    return (own if own.dtype is torch.bool else own == 0).long()
