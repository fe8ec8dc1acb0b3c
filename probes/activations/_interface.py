"""Attention as transformers' interface calls it: heard and changed where it is computed, without a map of all pairs."""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from probes.model.architectures import block_of, config_of, n_layers
from probes.model.passes import Hook, Side, all_hooked, attending_by

NAME = "thinksteer"
_FEWEST_SCORES = 2**20  # of a chunk: fewer would only cost time
# Tensors that attention is given: those that say where it is, and change no score, and those that are known here.
_KNOWN = ("position_ids", "cache_position", "s_aux", "scaling", "softcap")


@dataclass(frozen=True, eq=False)
class Attention:
    """One call of one layer's attention, as transformers makes it: the arguments, and `words`, the keywords.

    `eager`: does the model compute it by its family's own function? Else by SDPA, where that can.
    """

    module: nn.Module
    query: Float[Tensor, "batch heads new d_head"]
    key: Float[Tensor, "batch n_kv_heads keys d_head"]
    value: Float[Tensor, "batch n_kv_heads keys d_value"]
    mask: Tensor | None
    words: Mapping[str, Any]
    eager: bool = False

    @cached_property
    def output(self) -> Float[Tensor, "batch new heads d_value"]:
        """What the model computes by itself."""
        if not self._by_eager:
            return self.run(slice(None), self.mask)
        parts = [self.run(rows, self.seen(rows)) for rows in self.chunks()]
        return torch.cat(parts, dim=1)

    def run(self, rows: slice, mask: Tensor | None) -> Float[Tensor, "batch rows heads d_value"]:
        """The output of some queries under a mask: of yes and no, or added to the scores."""
        query, attend = self.query[:, :, rows], self._own if self._by_eager else sdpa_attention_forward
        if self._by_eager and mask is not None:
            mask = added(mask, query.dtype)
        output: Tensor = attend(self.module, query, self.key, self.value, mask, **self.words)[0]
        return output

    def seen(self, rows: slice) -> Tensor:
        """The mask of some queries; without one, what does not come later is seen."""
        if self.mask is not None:
            return self.mask[..., rows, : self.key.shape[2]]
        places = torch.arange(self.key.shape[2], device=self.key.device)
        if self.query.shape[2] == 1:  # the last token, of a cache
            return torch.ones_like(places, dtype=torch.bool)[None, None, None]
        seen: Tensor = places <= places[: self.query.shape[2]][rows, None]
        return seen[None, None]

    def chunks(self, maps: int = 1) -> Iterator[slice]:
        """Queries at a time, where each has so many maps of its keys in a row of the batch, or one for each head."""
        batch, heads, new, d_head = self.query.shape
        return chunks(0, new, batch * (heads if self._by_eager else maps) * self.key.shape[2], d_head)

    def row(self, i: int) -> "Attention":
        """One row of the batch."""
        mask = None if self.mask is None else self.mask[i % len(self.mask)][None]
        query, key, value = (x[i : i + 1] for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, mask=mask)

    @property
    def _by_eager(self) -> bool:
        return self.eager or any(self.words.get(name) is not None for name in ("softcap", "s_aux"))

    @property
    def _own(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        files = (sys.modules[kind.__module__] for kind in type(self.module).__mro__)
        own = next((f for file in files if (f := getattr(file, "eager_attention_forward", None)) is not None), None)
        if own is None:
            raise ValueError(
                f"{type(self.module).__name__} has no eager_attention_forward beside it: load the model with sdpa."
            )
        found: Callable[..., tuple[Tensor, Tensor | None]] = own
        return found


@dataclass(frozen=True, eq=False)
class Bias:
    """What is added to each query's scores of some keys, before the softmax: at one head, or at all. -inf hides them,
    but for a query that would then see nothing."""

    amount: Float[Tensor, "batch new"]
    keys: Bool[Tensor, "batch keys"]
    head: int | None = None


@dataclass(frozen=True, eq=False)
class Biased:
    """An attention with biases on its scores. A query whose scores stay as they are gets the model's own output."""

    attention: Attention
    biases: tuple[Bias, ...] = ()

    def with_biases(self, biases: Collection[Bias]) -> "Biased":
        """The same with these, too: they add up."""
        return replace(self, biases=(*self.biases, *biases)) if biases else self

    def row(self, i: int) -> "Biased":
        """One row of the batch."""
        own = (replace(bias, amount=bias.amount[i : i + 1], keys=bias.keys[i : i + 1]) for bias in self.biases)
        return Biased(self.attention.row(i), tuple(own))

    def mask(self, rows: slice) -> Tensor:
        """Of some queries: of yes and no without biases, else added to the scores."""
        return self._mask(rows)[0] if self.biases else self.attention.seen(rows)

    @cached_property
    def output(self) -> Float[Tensor, "batch new heads d_value"]:
        plain, parts = self.attention.output, []
        if not self.biases:
            return plain
        for rows in self.attention.chunks(self._maps):
            mask, changed = self._mask(rows)
            new = self.attention.run(rows, mask)
            parts.append(new.where(changed.transpose(1, 2)[..., None], plain[:, rows]))
        return torch.cat(parts, dim=1)

    @property
    def _maps(self) -> int:
        """1 where all heads have the same biases."""
        return 1 if all(bias.head is None for bias in self.biases) else self.attention.query.shape[1]

    def _mask(self, rows: slice) -> tuple[Tensor, Bool[Tensor, "batch maps rows"]]:
        """The mask with the biases, and which queries they change."""
        dtype, seen = self.attention.query.dtype, self.attention.seen(rows)
        whole = added(seen, dtype)
        bias = sum((self._spread(bias, rows) for bias in self.biases), torch.zeros((), device=whole.device))
        left = (visible(seen) & (bias > -torch.inf)).any(-1, keepdim=True)
        bias = bias.where(left & visible(seen), 0)
        return whole + bias.to(dtype).clamp(min=torch.finfo(dtype).min), (bias != 0).any(-1)

    def _spread(self, bias: Bias, rows: slice) -> Float[Tensor, "batch maps rows keys"]:
        own = torch.where(bias.keys[:, None, None], bias.amount[:, None, rows, None], 0)
        if bias.head is None:
            return own
        heads = torch.arange(self._maps, device=own.device) == bias.head
        return own.where(heads[None, :, None, None], 0)


Listener = Callable[[int, Biased], Biased]
"""Hears the attention of a layer, and says what becomes of it."""


@contextmanager
def listening(model: PreTrainedModel, listener: Listener, *, layers: Collection[int] | None = None) -> Iterator[None]:
    """While open, `listener` hears the attention of each pass of the model in these layers, or in all that have one.

    The model computes what it did before, but for the biases that the listener adds: its configs name another
    implementation of attention while this is open, and their own again at the end. What later listeners hear is what
    earlier ones made of it. Raises ValueError for a family whose attention is not transformers' interface, at the end
    of a layer named in `layers` that was not heard, and for attention that changes scores in an unknown way.
    """
    session = _SESSIONS.get(model)
    if session is not None:
        with session.joined(listener, layers):
            yield
        return
    eager = getattr(config_of(model), "_attn_implementation", None) == "eager"
    session = _Session(str(config_of(model).model_type), eager)
    hooks: list[tuple[nn.Module, Hook, Side, str]] = []
    for layer in range(n_layers(model)):
        block = block_of(model, layer)
        hooks.append((block, partial(session.enter, layer), "input", f"block {layer}"))
        hooks.append((block, partial(session.leave, model, layer), "output", f"block {layer}"))
    parts = list(model.modules())
    with attending_by(model, NAME), all_hooked(model, hooks), session.joined(listener, layers):
        if config_of(model)._attn_implementation != NAME:
            raise ValueError(no_interface(model))
        _SESSIONS.update(dict.fromkeys(parts, session))
        try:
            yield
        finally:
            for part in parts:
                _SESSIONS.pop(part, None)


def no_interface(model: nn.Module, layer: int | None = None) -> str:
    """Why nothing was heard of a model, or of a layer, in a sentence."""
    family = config_of(model).model_type
    none = f"No layer of this {family} attends" if layer is None else f"Layer {layer} of this {family} does not attend"
    return (
        f"{none} through transformers' AttentionInterface, so what it pays attention to can be neither read nor "
        "scaled. Load the model with its own forward, without use_kernels; a family without attention has none."
    )


@dataclass(eq=False)
class _Session:
    """Who listens to a model, and the layer that its pass is in."""

    family: str
    eager: bool
    layer: int | None = None
    heard: bool = False
    listeners: list[tuple[Listener, Collection[int] | None]] = field(default_factory=list)

    @contextmanager
    def joined(self, listener: Listener, layers: Collection[int] | None) -> Iterator[None]:
        self.listeners.append((listener, layers))
        try:
            yield
        finally:
            self.listeners.remove((listener, layers))

    def enter(self, layer: int, *_: Any) -> None:
        self.layer, self.heard = layer, False

    def leave(self, model: nn.Module, layer: int, *_: Any) -> None:
        self.layer = None
        if not self.heard and any(layer in layers for _, layers in self.listeners if layers is not None):
            raise ValueError(no_interface(model, layer))

    def attend(self, attention: Attention) -> Tensor:
        biased = Biased(attention)
        if self.layer is None:
            return biased.output
        for listener, layers in self.listeners:
            if layers is None or self.layer in layers:
                self._check(attention)
                biased = listener(self.layer, biased)
        self.heard = True
        return biased.output

    def _check(self, attention: Attention) -> None:
        where, words = f"Layer {self.layer} of this {self.family}", attention.words
        unknown = [name for name, value in words.items() if isinstance(value, Tensor) and name not in _KNOWN]
        if unknown:
            raise ValueError(
                f"{where} gives its attention {', '.join(unknown)}, which changes who attends to whom in a way that is "
                "not known here. Known: a mask, a scaling, a soft cap, sinks."
            )
        if self.heard:
            raise ValueError(f"{where} attends more than once in a pass: its heads cannot be told apart here.")
        told = words.get("is_causal")
        causal = getattr(attention.module, "is_causal", True) if told is None else told
        if attention.mask is None and attention.query.shape[2] > 1 and not causal:
            raise ValueError(f"{where} attends to what comes later, too. Only causal attention is read and scaled.")


_SESSIONS: "WeakKeyDictionary[nn.Module, _Session]" = WeakKeyDictionary()  # by each part of a model that is heard


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **words: Any
) -> tuple[Tensor, None]:
    """An attention function as transformers calls one: the model's own output, or what listeners make of it."""
    session = _SESSIONS.get(module)
    attention = Attention(module, query, key, value, attention_mask, words, session is not None and session.eager)
    return attention.output if session is None else session.attend(attention), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of yes and no as one that is added to scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def visible(mask: Tensor) -> Bool[Tensor, "*mask"]:
    """A mask that is added to scores, or one of yes and no, as one of yes and no."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def chunks(start: int, stop: int, scores: int, d_head: int) -> Iterator[slice]:
    """Queries at a time, of which each has so many scores: a chunk's are a quarter as large as what all queries are."""
    size = max(1, d_head // 4, _FEWEST_SCORES // max(1, scores))
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))
