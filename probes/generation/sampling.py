"""Sampling whose randomness belongs to the prompt: it is the same in any batch, in any order, on any device."""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from probes.fields import from_plain, keys_of
from probes.rows import Rows


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    >>> from probes import Sampling, generate, load
    >>> model = load("organism")
    >>> Sampling.of(model)
    Sampling(temperature=0.7, top_p=1.0, top_k=0, max_new_tokens=4096, seed=0, min_p=0.0)
    >>> hot = Sampling(temperature=1.2, max_new_tokens=48)
    >>> [c.thinking for c in generate(model, ["a 3 b +4 quick"], samples=3, sampling=hot)]
    ['Easy', 'Hmm a =3 Wait a =3 b +4 =7 c +4 =1', 'Easy a =3']
    """

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 4096
    seed: int = 0
    min_p: float = 0.0

    @classmethod
    def of(cls, model: PreTrainedModel, *, max_new_tokens: int = 4096, seed: int = 0) -> "Sampling":
        """The model's own generation config; temperature 0.6 and top_p 0.95 where it names none (ThinkEdit's)."""
        config = model.generation_config
        if config is None or not config.do_sample:
            return cls(max_new_tokens=max_new_tokens, seed=seed)
        return cls(
            temperature=0.6 if config.temperature is None else config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            top_k=config.top_k or 0,
            max_new_tokens=max_new_tokens,
            seed=seed,
            min_p=config.min_p or 0.0,
        )

    @classmethod
    def from_dict(cls, fields: object, where: str = "A sampling") -> "Sampling":
        """Out of a file; rows of before there was `min_p` had none. Raises ValueError or TypeError for what is no
        sampling."""
        return from_plain(cls, {"min_p": 0.0, **keys_of(fields, where)}, where)

    def processors(self, keys: list[int], begins: Sequence[int], device: torch.device) -> LogitsProcessorList:
        """What makes greedy search draw from this distribution: of each row a key, and where its first new token is."""
        if self.temperature == 0:
            return LogitsProcessorList()
        steps: list[LogitsProcessor] = [TemperatureLogitsWarper(self.temperature)]
        if self.top_k:
            steps.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            steps.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            steps.append(MinPLogitsWarper(self.min_p))
        steps.append(GumbelNoise(torch.tensor(keys, device=device), torch.tensor(begins, device=device)))
        return LogitsProcessorList(steps)


Event = tuple[str, int]
CUT = "cut"


@runtime_checkable
class DecodingRun(Protocol):
    """One batch under a `Decoding`.

    >>> from probes.generation import DecodingRun
    >>> class Idle:  # leaves every token to the draw
    ...     def processors(self, draw):
    ...         return draw
    ...     def events(self):
    ...         return [[], []]  # of a batch of two
    >>> isinstance(Idle(), DecodingRun)
    True
    """

    def processors(self, draw: LogitsProcessorList) -> LogitsProcessorList:
        """What decides the next token, given what draws it: a processor before the draw changes the distribution,
        one after it sees the token drawn (the argmax) and may overrule it."""

    def events(self) -> Sequence[Sequence[Event]]:
        """For each row what was overruled, and at which of the generated tokens. `CUT`: the row was ended there."""


@runtime_checkable
class TurningRun(DecodingRun, Protocol):
    """A run that goes on when rows leave its batch and others join. Without it, a batch is written to its end first.

    >>> from probes.generation.sampling import TurningRun
    >>> from probes.rows import Rows
    >>> class Idle:
    ...     rows = Rows(None, (), ())
    ...     def turn(self, rows, mask):
    ...         self.rows = rows
    ...     def processors(self, draw):
    ...         return draw
    ...     def events(self):
    ...         return [[] for _ in self.rows.numbers]
    >>> isinstance(Idle(), TurningRun)
    True
    """

    def turn(self, rows: Rows, mask: Int[Tensor, "batch pos"] | None) -> None:
        """From here on tokens, and events, are of these rows: new ones where `mask` shows their prompts, else rows that
        began before. `processors` is asked for anew."""


@runtime_checkable
class ListeningRun(DecodingRun, Protocol):
    """A run that reads the model's passes.

    >>> from contextlib import nullcontext
    >>> from probes.generation.sampling import ListeningRun
    >>> class Idle:
    ...     def processors(self, draw):
    ...         return draw
    ...     def events(self):
    ...         return [[]]
    ...     def listening(self):
    ...         return nullcontext()
    >>> isinstance(Idle(), ListeningRun)
    True
    """

    def listening(self) -> AbstractContextManager[None]:
        """Open while the batch is written, from before its first pass."""


@runtime_checkable
class Decoding(Protocol):
    """What decides over tokens beside the model and the draw. Its `name` tells its completions from all others.

    >>> from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor
    >>> from probes import generate, load
    >>> class NeverEasy:  # the organism's token 55 is "Easy"
    ...     name = "never-easy"
    ...     def begin(self, mask):
    ...         self.rows = len(mask)
    ...         return self
    ...     def processors(self, draw):
    ...         return LogitsProcessorList([SuppressTokensLogitsProcessor([55]), *draw])
    ...     def events(self):
    ...         return [[]] * self.rows
    >>> model = load("organism")
    >>> generate(model, ["a 3 b +4 c *7 quick"])[0].thinking
    'Easy'
    >>> generate(model, ["a 3 b +4 c *7 quick"], decoding=NeverEasy())[0].thinking
    'Hmm a =3 b +4 =7 c *7 =9'
    """

    @property
    def name(self) -> str: ...

    def begin(self, mask: Int[Tensor, "batch pos"]) -> DecodingRun:
        """For a batch of prompts, padded on the left where `mask` is 0."""


def row_key(prompt_ids: list[int], seed: int, sample: int) -> int:
    """63 bits that belong to one sample of one prompt."""
    digest = hashlib.sha256(f"{seed}/{sample}/{prompt_ids}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class GumbelNoise(LogitsProcessor):
    """argmax(logits + Gumbel noise) is a draw from softmax(logits) (Gumbel 1954).

    The noise is a hash of (row key, step, token), not a generator's state: a batch of one and a batch of many draw
    the same tokens, and two models given one prompt share their noise, so that they can be compared in pairs.
    """

    def __init__(self, keys: Int[Tensor, " batch"], begins: Int[Tensor, " batch"]) -> None:
        self.keys, self.begins = keys, begins

    def __call__(
        self, input_ids: Int[Tensor, "batch pos"], scores: Float[Tensor, "batch d_vocab"]
    ) -> Float[Tensor, "batch d_vocab"]:
        keys = _mix(self.keys + (input_ids.shape[1] - self.begins))
        tokens = torch.arange(scores.shape[1], device=scores.device)
        noisy = torch.empty_like(scores)
        few = len(scores) if scores.is_cuda else _AT_ONCE
        for start in range(0, len(scores), few):  # what stays in a processor's cache is three times as fast
            rows = slice(start, start + few)
            bits = _shift(_mix(keys[rows, None] + tokens), 12)
            uniform = bits.double().add_(0.5).div_(2**52)  # never 0, never 1
            noisy[rows] = scores[rows] + uniform.log_().neg_().log_().neg_().to(scores.dtype)
        return noisy


_AT_ONCE = 2  # rows


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), in place of a copy; int64 arithmetic wraps."""
    x = x + _signed(0x9E3779B97F4A7C15)
    for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x.bitwise_xor_(_shift(x, bits)).mul_(_signed(factor))
    return x.bitwise_xor_(_shift(x, 31))


def _shift(x: Tensor, n: int) -> Tensor:
    """Shift right, filling with zeros."""
    return (x >> n).bitwise_and_((1 << (64 - n)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
