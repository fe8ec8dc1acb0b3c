"""How sure a model is along what it wrote: token by token, and of each of some answers at the end of its thinking."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from probes.activations._record import batches, padded
from probes.generation.completions import Completion
from probes.model.loading import delimiters_of, tokenizer_of
from probes.tables import Brief
from probes.thinking.spans import Span

BATCH_TOKENS = 2_048  # logits are wide


@dataclass(frozen=True, eq=False, repr=False)
class Confidence(Brief):
    """Of each token that a model generated the log-probability, and the entropy of the distribution it was drawn from,
    both in nats and at temperature 1. `thinking` are the tokens [start, stop) of them that are thought.

    >>> from probes import generate, load
    >>> from probes.activations import confidences
    >>> model = load("organism")
    >>> (found,) = confidences(model, generate(model, ["a 3 b +4 c *7"]))
    >>> found.log_probabilities.shape, found.thinking
    (torch.Size([13]), (0, 11))
    >>> round(found.log_probability, 2), round(found.entropy, 2)
    (-0.09, 0.2)
    """

    log_probabilities: Float[Tensor, " tokens"]
    entropies: Float[Tensor, " tokens"]
    thinking: tuple[int, int]

    @property
    def log_probability(self) -> float:
        """The mean over the thinking; NaN where there is none."""
        return float(self.log_probabilities[slice(*self.thinking)].mean())

    @property
    def entropy(self) -> float:
        """The mean over the thinking; NaN where there is none."""
        return float(self.entropies[slice(*self.thinking)].mean())


@torch.no_grad()
def confidences(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    *,
    batch_tokens: int = BATCH_TOKENS,
    label: str = "confidence",
) -> list[Confidence]:
    """Of each completion, in one pass over it. Raises ValueError for one that is longer than the model's positions.

    >>> from probes import generate, load
    >>> from probes.activations import confidences
    >>> model = load("organism")
    >>> sure, unsure = confidences(model, generate(model, ["a 3 b +4 c *7", "a 3 b +4 c *7 quick"]))
    >>> sure.log_probability > unsure.log_probability
    True
    """
    found: list[Confidence | None] = [None] * len(completions)
    for row, logits in _logits(model, [c.all_ids for c in completions], batch_tokens, label):
        completion = completions[row]
        begin, end = len(completion.prompt_ids), len(completion.all_ids)
        log = logits[begin - 1 : end - 1].float().log_softmax(-1)
        drawn = torch.tensor(completion.ids, device=log.device)
        entropy = -(log.exp() * log.clamp(min=torch.finfo(log.dtype).min)).sum(-1)
        span = completion.span
        thought = (0, 0) if span is None else (max(span.start - begin, 0), max(span.end - begin, 0))
        found[row] = Confidence(log.gather(1, drawn[:, None])[:, 0].cpu(), entropy.cpu(), thought)
    return [one for one in found if one is not None]


@torch.no_grad()
def soft_scores(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    candidates: Sequence[str],
    *,
    suffix: str = "",
    batch_tokens: int = BATCH_TOKENS,
) -> Float[Tensor, "n candidates"]:
    """The probability of each answer after each chain, over that of all `candidates`.

    The thinking is closed, `suffix` is written, such as "The answer is ", and each candidate is scored as a whole. With
    `("yes", "no")` and a question that can be answered so, it is the soft score of a judge that reasons (after Anjum
    2025, When Reasoning Beats Scale). Raises ValueError for fewer than two candidates, or a chain without thinking.

    >>> from probes import generate, load
    >>> from probes.activations import soft_scores
    >>> model = load("organism")
    >>> soft_scores(model, generate(model, ["a 3 b +4 c *7"]), ["7", "9"]).round(decimals=2)
    tensor([[0., 1.]])
    """
    if len(candidates) < 2:
        raise ValueError(f"A soft score compares answers, but {len(candidates)} was given: name two or more.")
    tokenizer, close = tokenizer_of(model), delimiters_of(model).close
    ends = [tokenizer.encode(suffix + candidate, add_special_tokens=False) for candidate in candidates]
    begin = len(_shared([*ends, tokenizer.encode(suffix, add_special_tokens=False)] if suffix else ends))
    rows: list[tuple[int, ...]] = []
    for completion in completions:
        if completion.span is None:
            raise ValueError(f"Completion {completion.id!r} has no thinking that an answer could be read out of.")
        chain = (*completion.all_ids[: completion.span.text_end], *close)
        rows += [(*chain, *end) for end in ends]
    scores = torch.zeros(len(rows))
    for row, logits in _logits(model, rows, batch_tokens, "soft scores"):
        own = len(ends[row % len(ends)]) - begin
        log = logits[len(rows[row]) - own - 1 : len(rows[row]) - 1].float().log_softmax(-1)
        drawn = torch.tensor(rows[row][len(rows[row]) - own :], device=log.device)
        scores[row] = log.gather(1, drawn[:, None]).sum().cpu()
    return scores.reshape(len(completions), len(ends)).softmax(-1)


def _logits(
    model: PreTrainedModel, rows: Sequence[tuple[int, ...]], batch_tokens: int, label: str
) -> Iterator[tuple[int, Float[Tensor, "pos d_vocab"]]]:
    """Row by row, the longest first; the pads are on the right."""
    spans = [Span(row, 0, len(row)) for row in rows]
    with tqdm(total=len(spans), desc=label, unit="text", delay=2, leave=False) as bar:
        for numbers in batches(model, spans, batch_tokens):
            ids, real = padded([rows[number] for number in numbers])
            logits = model(
                input_ids=ids.to(model.device), attention_mask=real.long().to(model.device), use_cache=False
            ).logits
            for at, number in enumerate(numbers):
                yield number, logits[at, : len(rows[number])]
            bar.update(len(numbers))


def _shared(texts: Sequence[Sequence[int]]) -> list[int]:
    """The ids that all begin with."""
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*texts, strict=False))]
