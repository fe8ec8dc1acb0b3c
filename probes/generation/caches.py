"""What a model remembers of the rows of a batch while they are written: rows leave it, and others join."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

_KNOWN = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
_TENSORS = ("attention_mask", "position_ids", "token_type_ids")  # [batch, pos], 0 at a pad


def is_movable(state: dict[str, Any], batch: int) -> bool:
    """Can rows leave and join the batch that these arguments of a forward pass hold: is each tensor known, and are the
    rows' positions told? A model that counts the columns of its cache would take a row that has moved for another."""
    caches = [value for value in state.values() if hasattr(value, "layers")]
    return (
        [type(cache) for cache in caches] == [DynamicCache]
        and isinstance(state.get("position_ids"), Tensor)
        and all(type(layer) in _KNOWN for layer in caches[0].layers)
        and all(
            name in _TENSORS and value.shape[:1] == (batch,) and value.dim() == 2
            for name, value in state.items()
            if isinstance(value, Tensor)
        )
        and all(value is None or isinstance(value, Tensor | DynamicCache | bool | int) for value in state.values())
    )


def begun(blank: Mapping[str, Any], mask: Int[Tensor, "batch pos"]) -> dict[str, Any]:
    """The arguments of a first pass over new rows, as transformers has them, from those of others without tensors."""
    found = {
        "attention_mask": None if bool(mask.all()) else mask,
        "position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 0),
        "token_type_ids": torch.zeros_like(mask),
    }
    return {name: found[name] if name in found else deepcopy(value) for name, value in blank.items()}


def rearranged(
    parts: Sequence[tuple[dict[str, Any], Sequence[int]]], width: int, begins: Int[Tensor, " batch"]
) -> dict[str, Any]:
    """Some rows of one or two batches as one batch, `width` tokens wide; a row has pads before `begins`."""
    first = parts[0][0]
    state = dict(first)
    if "attention_mask" in state:  # left out, as transformers does, where there is no pad
        mask = torch.arange(width, device=begins.device) >= begins[:, None]
        state["attention_mask"] = None if bool(mask.all()) else mask.long()
    for name, value in first.items():
        if name == "attention_mask":
            continue
        if isinstance(value, Tensor):
            state[name] = torch.cat([widened(own[name][list(rows)], width, 0) for own, rows in parts])
        elif isinstance(value, DynamicCache):
            caches = [(own[name], torch.tensor(rows, dtype=torch.long)) for own, rows in parts]
            for number, layer in enumerate(value.layers):
                _join(layer, [(cache.layers[number], rows) for cache, rows in caches], width - 1)
    return state


def widened(x: Tensor, width: int, fill: int, dim: int = 1) -> Tensor:
    """The last `width` columns, filled on the left where there are fewer."""
    have = x.shape[dim]
    if have >= width:
        return x.narrow(dim, have - width, width)
    return pad(x, (*(0, 0) * (x.dim() - dim - 1), width - have, 0), value=fill)


def _join(into: Any, parts: list[tuple[Any, Tensor]], width: int) -> None:
    """Rows of a layer of the cache, or of two, put into the first; the cache has `width` columns then."""
    if isinstance(into, DynamicLayer) and into.is_initialized:
        columns = width
        if isinstance(into, DynamicSlidingWindowLayer):
            columns, into.cumulative_length = min(width, into.sliding_window - 1), width
        for name in ("keys", "values"):
            setattr(into, name, _rows([(getattr(layer, name), rows) for layer, rows in parts], columns))
    if isinstance(into, LinearAttentionLayer):
        for name in ("conv_states", "recurrent_states"):
            for at, state in getattr(into, name).items():
                if state is not None:
                    getattr(into, name)[at] = _rows([(getattr(layer, name)[at], rows) for layer, rows in parts], None)


def _rows(parts: list[tuple[Tensor, Tensor]], columns: int | None) -> Tensor:
    if columns is None:
        return torch.cat([x[rows.to(x.device)] for x, rows in parts])
    first, batch = parts[0][0], sum(len(rows) for _, rows in parts)
    whole, at = first.new_zeros((batch, first.shape[1], columns, *first.shape[3:])), 0
    for x, rows in parts:  # copied once: a cache is large
        new = min(x.shape[2], columns)
        whole[at : at + len(rows), :, columns - new :] = x[:, :, x.shape[2] - new :].index_select(0, rows.to(x.device))
        at += len(rows)
    return whole
