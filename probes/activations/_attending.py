"""Attention that is read where it is computed: what some queries pay to some keys, without a map of all pairs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._interface import Biased, chunks, listening, visible
from probes.model.architectures import config_of


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
    on the prompt. The model computes what it did before. Raises ValueError for a family whose attention is not
    transformers' interface, or holds what is not read here.
    """
    reader = _Reader(str(config_of(model).model_type), tuple(questions))
    with listening(model, reader.read):
        yield reader.found


@dataclass
class _Reader:
    """What is asked of the pass that runs now, and what was found."""

    family: str
    questions: tuple[Question, ...]
    found: Found = field(default_factory=dict)

    def read(self, layer: int, biased: Biased) -> Biased:
        query, key, words = biased.attention.query, biased.attention.key, biased.attention.words
        if len(query) != len(self.questions) or query.shape[2] != key.shape[2]:
            raise ValueError(
                f"Layer {layer} of this {self.family} attends from {query.shape[2]} queries to {key.shape[2]} keys in "
                f"{len(query)} rows, for {len(self.questions)} rows of text: its keys are not the tokens, and a span "
                "of them cannot be found."
            )
        scaling, sinks = words.get("scaling"), words.get("s_aux")
        score = partial(
            _scores,
            scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=words.get("softcap"),
        )
        sinks = None if sinks is None else sinks.float().flatten()
        rows = enumerate(self.questions)
        self.found[layer] = [_answer(question, biased.row(i), sinks, score) for i, question in rows]
        return biased


def _answer(
    question: Question,
    row: Biased,
    sinks: Float[Tensor, " heads"] | None,
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Float[Tensor, "2 sets heads steps"]:
    query, key = row.attention.query[0], row.attention.key[0]
    keys, parts = key[:, : question.stop].float(), []
    for rows in chunks(question.start, question.stop, len(query) * keys.shape[1], query.shape[-1]):
        seen = row.mask(rows)[0, ..., : question.stop]
        scores = score(query[:, rows].float(), keys, seen)
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
    if seen.dtype != torch.bool:
        scores = scores.add_(seen)
    out: Tensor = scores.masked_fill_(~visible(seen), -torch.inf)
    return out
