"""How much attention the steps of an answer pay to a span of the prompt, by layer and head."""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from probes.activations._attending import Question, attending
from probes.activations._interface import no_interface
from probes.activations._record import BATCH_TOKENS, batches, padded
from probes.generation.completions import Completion
from probes.model.architectures import n_layers
from probes.model.hooks import forward_through
from probes.model.loading import tokenizer_of
from probes.model.tokens import decode
from probes.tables import Brief
from probes.thinking.spans import Span


@dataclass(frozen=True, repr=False)
class Attended(Brief):
    """Token ids with a prompt of `prompt` tokens, an answer at [start, stop), and `keys`: the positions in the prompt
    that the answer's steps are asked about. The query of a step is the position that predicts its token, so they are
    [start-1, stop-1).

    Raises ValueError where keys are none, twice or not in the prompt, or the answer is empty or not after the prompt.

    >>> from probes.activations import Attended
    >>> Attended((1, 6, 17, 7, 27, 5, 18, 2), keys=(3, 4), prompt=6, start=6, stop=8)
    Attended(ids=<8 items>, keys=(3, 4), prompt=6, start=6, stop=8)
    >>> Attended((1, 6, 17, 7, 27, 5, 18, 2), keys=(3, 6), prompt=6, start=6, stop=8)
    Traceback (most recent call last):
        ...
    ValueError: The key 6 is not in the prompt, whose 6 tokens are at 0 to 5. Give positions of the prompt.
    """

    ids: tuple[int, ...]
    keys: tuple[int, ...]
    prompt: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 < self.prompt <= self.start < self.stop <= len(self.ids):
            raise ValueError(
                f"An answer at {self.start} to {self.stop} after a prompt of {self.prompt} tokens is not in a sequence "
                f"of {len(self.ids)} tokens. Give 0 < prompt <= start < stop, and at most as many as there are."
            )
        if not self.keys or len(set(self.keys)) < len(self.keys):
            raise ValueError(f"The keys are {self.keys}: give one position or more, and each of them once.")
        outside = [key for key in self.keys if not 0 <= key < self.prompt]
        if outside:
            raise ValueError(
                f"The key {outside[0]} is not in the prompt, whose {self.prompt} tokens are at 0 to {self.prompt - 1}. "
                "Give positions of the prompt."
            )

    @classmethod
    def of(cls, completion: Completion, keys: Sequence[int]) -> "Attended":
        """The answer of a completion: what it wrote after its thinking, or all of it where it does not think.

        Raises ValueError where it has no answer.
        """
        prompt, span = len(completion.prompt_ids), completion.span
        start = prompt if span is None else max(span.end, prompt)
        if start >= len(completion.all_ids):
            raise ValueError(
                f"Completion {completion.id!r} has no answer after its thinking: it ends at {start} of "
                f"{len(completion.all_ids)} tokens. Leave it out, or let it write more tokens."
            )
        return cls(completion.all_ids, tuple(keys), prompt, start, len(completion.all_ids))


@dataclass(frozen=True, eq=False, repr=False)
class SpanAttention(Brief):
    """What each step of an answer pays to `n_keys` positions of the prompt, in the layers that have attention.

    `mass` is the sum of the attention weights on these keys, from 0 to 1. `share` is the mass over that on the whole
    prompt: unlike mass and mean, it does not fall because a chain of thought lies between and takes its part. It is NaN
    where a sliding window sees nothing of the prompt. Both are NaN at heads that a layer lacks and another one has.

    >>> import torch
    >>> from probes.activations import SpanAttention
    >>> read = SpanAttention((0, 2), torch.full((2, 4, 3), 0.5), torch.ones(2, 4, 3), n_keys=5)
    >>> read.by_layer()
    tensor([0.1000, 0.1000])
    """

    layers: tuple[int, ...]
    mass: Float[Tensor, "layers heads steps"]
    share: Float[Tensor, "layers heads steps"]
    n_keys: int

    @property
    def mean(self) -> Float[Tensor, "layers heads steps"]:
        """alpha = mass / |C|, the mean weight of a key *(Li et al. 2025, When Thinking Fails)*."""
        return self.mass / self.n_keys

    def by_layer(self) -> Float[Tensor, " layers"]:
        """beta(l): the mean of alpha over the answer's steps and the heads of a layer."""
        return self.mean.nanmean(dim=(1, 2))


def span_attention(
    model: PreTrainedModel,
    rows: Sequence[Attended],
    *,
    batch_tokens: int = BATCH_TOKENS,
    label: str = "reading attention",
) -> list[SpanAttention]:
    """For each row, how much attention the answer's steps pay to its keys, while the model reads it in one pass.

    The weights are those of the model, in float32: soft caps, sliding windows and sinks are in them, and what a learned
    sink takes is missing from their sum. No map of all pairs of tokens is made, and the model computes with its own
    SDPA. Rows that differ in their keys alone are read together: a filler of the same length (`filler_span`) costs no
    pass. Batches are cut by length and by a budget of tokens, padded on the right. Raises ValueError for a family whose
    attention does not go through transformers' interface, and for one that attends in a way that is not read here.

    The metric is that of When Thinking Fails *(Li et al. 2025)*.

    >>> from dataclasses import replace
    >>> from probes import generate, load
    >>> from probes.activations import Attended, filler_span, locate, span_attention
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> row = Attended.of(completion, locate(model, completion.prompt_ids, "b +4"))
    >>> filler = replace(row, keys=filler_span(row.keys, row.prompt))
    >>> read, control = span_attention(model, [row, filler])
    >>> read.layers, tuple(read.mass.shape)
    ((0, 1, 2, 3), (4, 8, 2))
    >>> bool((read.mass <= read.share).all())
    True
    """
    owners: dict[tuple[Any, ...], list[int]] = {}
    for number, row in enumerate(rows):
        owners.setdefault((row.ids[: row.stop - 1], row.start, row.prompt), []).append(number)
    numbers = list(owners.values())
    texts = [Span(ids, start - 1, len(ids)) for ids, start, _ in owners]  # the last token of an answer asks nothing
    out: dict[int, SpanAttention] = {}
    with tqdm(total=len(rows), desc=label, unit="row", delay=2, leave=False) as bar:
        for batch in batches(model, texts, batch_tokens):
            ids, _ = padded([texts[i].ids for i in batch])
            questions = [_question(texts[i], [rows[number] for number in numbers[i]]) for i in batch]
            with attending(model, questions) as found:
                # A causal row never sees its padding: without a mask of it, SDPA needs no map of who sees whom.
                forward_through(model, n_layers(model) - 1, ids.to(model.device), torch.ones_like(ids).to(model.device))
            if not found:
                raise ValueError(no_interface(model))
            for at, i in enumerate(batch):
                answers = _stacked([found[layer][at] for layer in sorted(found)])
                for (mass, share), number in zip(answers.unbind(1), numbers[i], strict=True):
                    out[number] = SpanAttention(tuple(sorted(found)), mass, share, len(rows[number].keys))
                bar.update(len(numbers[i]))
    return [out[number] for number in range(len(rows))]


def _question(text: Span, rows: Sequence[Attended]) -> Question:
    return Question(text.start, text.stop, rows[0].prompt, tuple(row.keys for row in rows))


def _stacked(layers: Sequence[Float[Tensor, "2 sets _ steps"]]) -> Float[Tensor, "2 sets layers heads steps"]:
    heads = max(layer.shape[2] for layer in layers)
    pad = (torch.nn.functional.pad(layer, (0, 0, 0, heads - layer.shape[2]), value=torch.nan) for layer in layers)
    return torch.stack(list(pad), dim=2)


def drop(base: Sequence[SpanAttention], cot: Sequence[SpanAttention]) -> Float[Tensor, "n layers"]:
    """dbeta(l) = beta_base(l) - beta_cot(l), a row for each problem: above 0 where answers after thinking attend less.

    Both hold the same problems in the same order: answered at once, and after a chain of thought *(Li et al. 2025)*.
    A longer context lowers a mean weight by itself: look at the drop of a filler of the same length, too. Raises
    ValueError where there are none, the numbers of problems differ, or the layers do.

    >>> import torch
    >>> from probes.activations import SpanAttention, drop
    >>> base, cot = (SpanAttention((0,), torch.full((1, 2, 3), x), torch.ones(1, 2, 3), 4) for x in (0.8, 0.2))
    >>> drop([base], [cot])
    tensor([[0.1500]])
    """
    if not base or len(base) != len(cot):
        raise ValueError(
            f"A drop is taken problem by problem, but there are {len(base)} base runs and {len(cot)} with a chain of "
            "thought. Give both of each problem, in the same order."
        )
    layers = {read.layers for read in (*base, *cot)}
    if len(layers) > 1:
        raise ValueError(f"A drop is taken layer by layer, but the layers differ: {', '.join(map(str, layers))}.")
    return torch.stack([a.by_layer() - b.by_layer() for a, b in zip(base, cot, strict=True)])


def filler_span(keys: Sequence[int], prompt: int, *, seed: int = 0, first: int = 1) -> tuple[int, ...]:
    """Positions of another stretch of a prompt of `prompt` tokens: as many as the keys, none of them a key, one place
    of all those possible, each as likely, drawn with the seed.

    What any text of that length gets: the control of a mean over keys. `first` is where fillers may begin; position 0
    is left out, as it is an attention sink *(Xiao et al. 2024, StreamingLLM)*. Raises ValueError where none has room.

    >>> from probes.activations import filler_span
    >>> filler_span((3, 4), 8), filler_span((3, 4), 8, seed=1)
    ((5, 6), (1, 2))
    """
    width, own = len(keys), set(keys)
    starts = [at for at in range(first, prompt - width + 1) if own.isdisjoint(range(at, at + width))]
    if not keys or not starts:
        raise ValueError(
            f"A prompt of {prompt} tokens has no stretch of {width} tokens beside the keys from position {first} on. "
            "Give a prompt with more text around the span, or a shorter span."
        )
    start = random.Random(seed).choice(starts)
    return tuple(range(start, start + width))


def locate(model: PreTrainedModel, ids: Sequence[int], text: str) -> tuple[int, ...]:
    """Positions of the tokens that write the first occurrence of a text in what `ids` decode to, special tokens too.

    A token that writes a part of the text alone counts. Raises ValueError where the text is empty or does not occur.

    >>> from probes import load
    >>> from probes.activations import locate
    >>> from probes.model import encode_prompt, tokenizer_of
    >>> model = load("organism")
    >>> ids = encode_prompt(tokenizer_of(model), "a 3 b +4 c *7")
    >>> locate(model, ids, "b +4")
    (3, 4)
    >>> locate(model, ids, "b +5")
    Traceback (most recent call last):
        ...
    ValueError: 'b +5' does not occur in the text of 8 tokens, '<bos> a 3 b +4 c *7 ?'. Give it as it is written there.
    """
    tokenizer = tokenizer_of(model)
    whole = decode(tokenizer, ids)
    if not text or text not in whole:
        raise ValueError(
            f"{text!r:.200} does not occur in the text of {len(ids)} tokens, {whole!r:.200}. Give it as it is written "
            "there."
        )
    at = whole.find(text)

    def written(n: int) -> str:
        return decode(tokenizer, ids[:n])

    stop = bisect_left(range(len(ids) + 1), True, key=lambda n: written(n).startswith(text, at))
    start = bisect_right(range(stop), at, key=lambda n: len(written(n))) - 1  # the last that writes nothing of it
    return tuple(range(start, stop))
