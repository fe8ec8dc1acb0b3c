"""Attention that is read where it is computed: what some queries pay to some keys, without a map of all pairs."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from probes.model.architectures import block_of, config_of, n_layers
from probes.model.passes import Hook, Side, all_hooked

NAME = "thinksteer_reading"
_FEWEST_SCORES = 2**20  # of a chunk: fewer would only cost time
_NO_SCORES = ("position_ids", "cache_position")  # tensors that attention is given, and that change no score


@dataclass(frozen=True)
class Question:
    """Of one row of a batch: the queries [start, stop), and the sets of keys that each of them is asked about, within
    a prompt of so many tokens."""

    start: int
    stop: int
    prompt: int
    keys: tuple[tuple[int, ...], ...]


Found = dict[int, list[Float[Tensor, "2 sets heads steps"]]]


@contextmanager
def attending(model: PreTrainedModel, questions: Sequence[Question]) -> Iterator[Found]:
    """While open, a pass of the model answers a question for each of its rows; the answers are kept by layer.

    An answer holds, for each set of keys, head and query, the mass of attention on the set, and its share of the mass
    on the prompt. The model computes what it did before: its configs name another implementation of attention while
    this is open, and their own again at the end. Raises ValueError for a family whose attention is not transformers'
    interface, or holds what is not read here.
    """
    eager = getattr(config_of(model), "_attn_implementation", None) == "eager"
    reader = _Reader(str(config_of(model).model_type), tuple(questions), eager)

    def enter(layer: int, *_: Any) -> None:
        reader.layer = layer

    hooks: list[tuple[nn.Module, Hook, Side, str]] = [
        (block_of(model, layer), partial(enter, layer), "input", f"block {layer}") for layer in range(n_layers(model))
    ]
    with _switched(model), all_hooked(model, hooks):
        token = _READER.set(reader)
        try:
            yield reader.found
        finally:
            _READER.reset(token)


@contextmanager
def _switched(model: PreTrainedModel) -> Iterator[None]:
    """While open, every config of the model names our attention."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    configs = {id(config): config for part in parts for config in _configs(part.config)}  # the outer ones first
    former = [(config, config._attn_implementation) for config in configs.values()]
    try:
        model.set_attn_implementation(NAME)
        if config_of(model)._attn_implementation != NAME:
            raise ValueError(no_interface(model))
        yield
    finally:
        for config, name in former:
            config._attn_implementation = name


def _configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if isinstance(part, PretrainedConfig):
            yield from _configs(part)


def no_interface(model: nn.Module) -> str:
    """Why nothing was read of a model, in a sentence."""
    return (
        f"No layer of this {config_of(model).model_type} attends through transformers' AttentionInterface, so what it "
        "pays attention to cannot be read. Load the model with its own forward, without use_kernels; a family without "
        "attention has none to read."
    )


@dataclass
class _Reader:
    """What is asked of the pass that runs now, the layer it is in, and what was found."""

    family: str
    questions: tuple[Question, ...]
    eager: bool
    layer: int | None = None
    found: Found = field(default_factory=dict)

    def read(self, query: Tensor, key: Tensor, mask: Tensor | None, words: Mapping[str, Any], causal: bool) -> None:
        if self.layer is None:
            return
        self._check(query, key, mask, words, causal)
        scaling, sinks = words.get("scaling"), words.get("s_aux")
        score = partial(
            _scores,
            scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=words.get("softcap"),
        )
        sinks = None if sinks is None else sinks.float().flatten()
        answers = []
        for i, question in enumerate(self.questions):
            own = None if mask is None else mask[i % len(mask)]
            answers.append(_answer(question, query[i], key[i], own, sinks, score))
        self.found[self.layer] = answers

    def _check(self, query: Tensor, key: Tensor, mask: Tensor | None, words: Mapping[str, Any], causal: bool) -> None:
        where = f"Layer {self.layer} of this {self.family}"
        unknown = [name for name, value in words.items() if isinstance(value, Tensor) and name not in _NO_SCORES]
        unknown = [name for name in unknown if name not in ("s_aux", "scaling", "softcap")]
        if unknown:
            raise ValueError(
                f"{where} gives its attention {', '.join(unknown)}, which changes who attends to whom in a way that is "
                "not read here. Known: a mask, a scaling, a soft cap, sinks."
            )
        if self.layer in self.found:
            raise ValueError(f"{where} attends more than once in a pass: its heads cannot be told apart here.")
        if len(query) != len(self.questions) or query.shape[2] != key.shape[2]:
            raise ValueError(
                f"{where} attends from {query.shape[2]} queries to {key.shape[2]} keys in {len(query)} rows, for "
                f"{len(self.questions)} rows of text: its keys are not the tokens, and a span of them cannot be found."
            )
        if mask is None and not causal:
            raise ValueError(f"{where} attends to what comes later, too. Attention is read of causal models alone.")


_READER: ContextVar[_Reader | None] = ContextVar("thinksteer_reader", default=None)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **words: Any
) -> tuple[Tensor, None]:
    """An attention function as transformers calls one: the model's own output, read on the way."""
    reader = _READER.get()
    if reader is not None:
        causal = words.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        reader.read(query, key, attention_mask, words, causal)
    beyond_sdpa = words.get("softcap") is not None or words.get("s_aux") is not None
    if beyond_sdpa or (reader is not None and reader.eager):
        return _eager(module, query, key, value, attention_mask, words), None
    output: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **words)[0]
    return output, None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, words: Mapping[str, Any]
) -> Float[Tensor, "batch pos n_heads d_head"]:
    """What the family's own eager function gives, some queries at a time."""
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    own = next((f for file in files if (f := getattr(file, "eager_attention_forward", None)) is not None), None)
    if own is None:
        raise ValueError(f"{type(module).__name__} has no eager_attention_forward beside it: load the model with sdpa.")
    batch, heads, width, d_head = query.shape
    parts = []
    for rows in _chunks(0, width, batch * heads * key.shape[2], d_head):
        seen = _seen(mask, rows, key)
        if seen.dtype == torch.bool:
            seen = torch.zeros(seen.shape, dtype=query.dtype, device=seen.device).masked_fill_(
                ~seen, torch.finfo(query.dtype).min
            )
        parts.append(own(module, query[:, :, rows], key, value, seen, **words)[0])
    return torch.cat(parts, dim=1)


def _answer(
    question: Question,
    query: Float[Tensor, "heads pos d_head"],
    key: Float[Tensor, "n_kv_heads pos d_head"],
    mask: Tensor | None,
    sinks: Float[Tensor, " heads"] | None,
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Float[Tensor, "2 sets heads steps"]:
    keys, parts = key[:, : question.stop].float(), []
    for rows in _chunks(question.start, question.stop, len(query) * keys.shape[1], query.shape[-1]):
        scores = score(query[:, rows].float(), keys, _seen(mask, rows, keys))
        whole = scores.logsumexp(-1)
        if sinks is not None:
            whole = torch.logaddexp(whole, sinks[:, None])
        prompt = scores[..., : question.prompt].logsumexp(-1)
        spans = torch.stack([scores[..., list(one)].logsumexp(-1) for one in question.keys])
        parts.append(torch.stack([(spans - whole).exp(), (spans - prompt).exp()]))
    return torch.cat(parts, dim=-1).cpu()


def _scores(
    query: Float[Tensor, "heads steps d_head"],
    key: Float[Tensor, "n_kv_heads pos d_head"],
    seen: Tensor,
    *,
    scaling: float,
    softcap: float | None,
) -> Float[Tensor, "heads steps pos"]:
    """Before the softmax; -inf where a query does not see a key."""
    grouped = query.unflatten(0, (len(key), -1)).flatten(1, 2)  # the queries of all heads that share keys
    scores = (grouped @ key.mT).view(*query.shape[:2], -1).mul_(scaling)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if seen.dtype == torch.bool:
        hidden = ~seen
    else:
        hidden, scores = seen <= torch.finfo(seen.dtype).min / 2, scores.add_(seen)
    out: Tensor = scores.masked_fill_(hidden, -torch.inf)
    return out


def _seen(mask: Tensor | None, rows: slice, key: Float[Tensor, "*heads pos d_head"]) -> Bool[Tensor, "..."] | Tensor:
    """The mask of some queries, which broadcasts over heads; without one, what does not come later is seen."""
    if mask is not None:
        return mask[..., rows, : key.shape[-2]]
    places = torch.arange(key.shape[-2], device=key.device)
    seen: Tensor = places <= places[rows, None]
    return seen.view(*[1] * (key.dim() - 2), *seen.shape)


def _chunks(start: int, stop: int, scores: int, d_head: int) -> Iterator[slice]:
    """Queries at a time, of which each has so many scores: a chunk's are a quarter as large as what all queries are."""
    size = max(1, d_head // 4, _FEWEST_SCORES // scores)
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))
