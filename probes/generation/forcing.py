"""Answers that are forced out of a chain of thought before it is over, or at its end, and how sure the model is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from probes.generation._batch import Transformers, end_ids
from probes.generation.completions import Completion
from probes.generation.engine import Row
from probes.generation.sampling import Event, Sampling
from probes.model.loading import delimiters_of, tokenizer_of
from probes.model.positions import check_room
from probes.model.tokens import decode, words_ids
from probes.rows import Rows
from probes.tables import Brief


@dataclass(frozen=True, repr=False)
class Forced(Brief):
    """What a model answers, greedily, once its thinking is cut at `stop` and closed for it.

    `first`, `second` and `entropy` (nats) are those of its distribution over the first token of that answer: the two
    largest probabilities, and how spread it is.

    >>> from probes.generation import Forced
    >>> forced = Forced("sum", 0, 12, "9", first=0.5, second=0.25, entropy=1.04)
    >>> forced.margin, forced.perplexity
    (0.25, 2.0)
    """

    id: str
    sample: int
    stop: int
    answer: str
    first: float
    second: float
    entropy: float

    @property
    def margin(self) -> float:
        """How much more likely the most likely token is than the next: the logit margin of Vilas et al. (2025)."""
        return self.first - self.second

    @property
    def perplexity(self) -> float:
        """One over the largest probability (Vilas et al. 2025)."""
        return 1 / self.first if self.first else math.inf


def forced_answers(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    stops: Sequence[Sequence[int]],
    *,
    suffix: str = "",
    max_new_tokens: int = 16,
    batch_size: int = 64,
    label: str = "forcing answers",
) -> list[list[Forced]]:
    """Of each completion, the answer after each of its `stops`: prompt and completion up to that position, the closing
    delimiter, then `suffix`, such as "The answer is", which the answer begins with.

    A completion's last stop, `span.text_end`, forces an answer of the whole chain. Raises ValueError where a stop lies
    outside of a completion's thinking, or the model has no thinking delimiters.

    >>> from probes import generate, load
    >>> from probes.generation import forced_answers
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> (found,) = forced_answers(model, [completion], [[12, 15, 18]])
    >>> [(forced.answer, round(forced.margin, 2)) for forced in found]
    [('6', 0.0), ('6', 0.0), ('9', 1.0)]
    """
    close = delimiters_of(model).close
    after = [*close, *(words_ids(tokenizer_of(model), suffix, "suffix") if suffix else ())]
    rows, owners = list[Row](), list[tuple[Completion, int]]()
    for completion, own in zip(completions, stops, strict=True):
        for stop in own:
            _check(completion, stop)
            prompt = (*completion.all_ids[:stop], *after)
            rows.append(Row(len(rows), f"{completion.id} at {stop}", completion.sample, prompt))
            owners.append((completion, stop))
    longest = max((len(row.prompt) for row in rows), default=0)
    check_room(model, longest, max_new_tokens)
    sampling, firsts = Sampling(temperature=0, top_p=1.0, max_new_tokens=max_new_tokens), _Firsts()
    found, write = dict[int, Forced](), Transformers().write
    ordered = sorted(rows, key=lambda row: -len(row.prompt))
    with tqdm(total=len(rows), desc=label, unit="answer", delay=2, leave=False) as bar:
        for part in write(model, ordered, sampling, firsts, batch_size=batch_size, run=object()) if ordered else ():
            for written in part:
                completion, stop = owners[written.row.number]
                answer = decode(tokenizer_of(model), _ended(written.ids, end_ids(model)))
                numbers = firsts.seen.pop(written.row.number)
                found[written.row.number] = Forced(
                    completion.id, completion.sample, stop, (suffix + answer).strip(), *numbers
                )
            bar.update(len(part))
    numbered = iter(range(len(rows)))
    return [[found[next(numbered)] for _ in own] for own in stops]


class _Firsts(LogitsProcessor):
    """Sees each row's scores once, those of its first new token; changes nothing."""

    name = "forced"

    def __init__(self) -> None:
        self.seen: dict[int, tuple[float, float, float]] = {}
        self.rows = Rows(None, (), ())
        self._fresh = False

    def begin(self, mask: Int[Tensor, "batch pos"]) -> "_Firsts":  # noqa: ARG002
        return self

    def turn(self, rows: Rows, mask: Int[Tensor, "batch pos"] | None) -> None:
        self.rows, self._fresh = rows, mask is not None

    def processors(self, draw: LogitsProcessorList) -> LogitsProcessorList:
        return LogitsProcessorList([self, *draw])

    def events(self) -> list[tuple[Event, ...]]:
        return [() for _ in self.rows.numbers]

    def __call__(
        self,
        input_ids: Int[Tensor, "batch pos"],  # noqa: ARG002
        scores: Float[Tensor, "batch d_vocab"],
    ) -> Float[Tensor, "batch d_vocab"]:
        if self._fresh:
            self.seen.update(zip(self.rows.numbers, map(tuple, sureness(scores).tolist()), strict=True))
            self._fresh = False
        return scores


def sureness(scores: Float[Tensor, "*rows d_vocab"]) -> Float[Tensor, "*rows 3"]:
    """Of each row of logits the two largest probabilities, and the entropy in nats."""
    log = scores.float().log_softmax(-1)
    best = log.topk(2, dim=-1).values.exp()
    entropy = -(log.exp() * log.clamp(min=torch.finfo(log.dtype).min)).sum(-1, keepdim=True)
    return torch.cat([best, entropy], -1)


def _ended(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Up to the first end."""
    at = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:at])


def _check(completion: Completion, stop: int) -> None:
    span = completion.span
    if span is None:
        raise ValueError(f"Completion {completion.id!r} has no thinking, so that no answer can be forced out of it.")
    if not span.text_start <= stop <= span.text_end:
        raise ValueError(
            f"An answer is forced within the thinking of {completion.id!r}, {span.text_start} to {span.text_end}, not "
            f"at {stop}."
        )
