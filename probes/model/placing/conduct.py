"""What must hold of a model's passes: no token changes what is before it, pads change nothing, nor does a cache."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from probes.model.architectures import config_of, n_layers
from probes.model.hooks import captured
from probes.model.placing.sums import close, random_ids
from probes.model.sites import Site


def broken_conduct(model: PreTrainedModel) -> Iterator[str]:
    """What does not hold, in words, of the last stream in short passes of random tokens."""
    ids = random_ids(model)
    whole = _last_stream(model, ids)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % config_of(model).vocab_size
    if not close(_last_stream(model, changed)[:, :-1], whole[:, :-1]):
        yield "a token changes the stream before it: as it is configured, this is no causal language model"
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    if not close(_last_stream(model, torch.where(mask == 1, ids.roll(2, 1), 0), mask)[0, 2:], whole[0, :-2]):
        yield "tokens that are padded on the left have other streams than alone"
    if not _steps(model, ids, whole[:, -1]):
        yield "a step with its cache gives another stream than a whole pass"


def _last_stream(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **words: Any) -> Tensor:
    site = Site(n_layers(model) - 1, "resid_post")
    if mask is not None:
        words["attention_mask"] = mask
        if "position_ids" in inspect.signature(model.forward).parameters:
            words["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with captured(model, [site]) as cache:
        model(input_ids=ids, **{"use_cache": False, **words})
    return cache[site]


def _steps(model: PreTrainedModel, ids: Tensor, last: Tensor) -> bool:
    """Is the last token's stream the same where all before it are in a cache?"""
    made = model(input_ids=ids[:, :-1], use_cache=True)
    name = next((name for name in ("past_key_values", "cache_params") if made.get(name) is not None), None)
    if name is None:
        return False
    words = {name: made[name], "use_cache": True}
    if name == "cache_params":
        words["attention_mask"] = torch.ones_like(ids[:, -1:])
    return close(_last_stream(model, ids[:, -1:], **words)[:, -1], last)
