"""One recipe in every way that a model is run: are the tokens the same, and how sure is each of them?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from probes.generation._batch import end_ids
from probes.model.loading import tokenizer_of
from probes.model.tokens import Prompt, encode_prompt
from probes.tables import Shown, Table
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied

Ids = list[int]
# How near the two likeliest tokens are where either may be written, in logits. In float32 two implementations differ by
# some 1e-5. Else it is four steps of the dtype between 16 and 32, where the largest logits lie: each layer rounds.
TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.float16: 4 * 2**-6, torch.bfloat16: 4 * 2**-3}


@dataclass(frozen=True)
class Heard:
    """What one prompt was answered: tokens, and of each its log-probability and, where it is known, by how much its
    logit is above the next.

    >>> from steer.engines import Heard
    >>> Heard([5, 6], [-0.1, -0.7], [4.0, 0.2]).ids
    [5, 6]
    """

    ids: Ids
    logprobs: list[float]
    margins: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Way:
    """What a way of running the model gave: answers, prompt by prompt, and the tokens that the recipe touched; or why
    there are none, and whether it was tried, and failed.

    >>> from steer.engines import Way
    >>> Way(left_out="vllm not installed").failed
    False
    """

    answers: tuple[Heard, ...] = ()
    touched: int | None = None
    left_out: str = ""
    failed: bool = False


Runner = Callable[[PreTrainedModel, Recipe | None, Sequence[Ids], int], Way]


@dataclass(frozen=True, eq=False, repr=False)
class Parity(Shown):
    """Answers by way; the first is what the others are compared with.

    A way that was run agrees where each of its answers is that of the first, or first differs at a token whose logit
    is within `tolerance` of the next: there the last bits of two sums decide.

    >>> from steer.engines import Heard, Parity, Way
    >>> sure, unsure = Heard([5, 6], [-0.1, -0.1], [4.0, 3.0]), Heard([5, 7], [-0.1, -0.9])
    >>> found = Parity({"single": Way((sure,)), "batched": Way((unsure,))}, tolerance=1e-3)
    >>> found.holds, found.first_difference("batched")
    (False, (0, 1, 3.0))
    """

    ways: Mapping[str, Way]
    tolerance: float

    @property
    def holds(self) -> bool:
        """Does every way that was run agree with the first?"""
        return not self.differing

    @property
    def differing(self) -> list[str]:
        """The ways that do not agree, or failed."""
        found = {name: list(self._differences(name)) for name in self.ways}
        far = {name for name, own in found.items() if any(margin > self.tolerance for *_, margin in own)}
        return [name for name, way in self.ways.items() if way.failed or name in far]

    def first_difference(self, name: str) -> tuple[int, int, float] | None:
        """Prompt, token and margin of the answer that differs where the first was surest; None where none does."""
        return max(self._differences(name), key=lambda found: found[2], default=None)

    def logprob_difference(self, name: str) -> float:
        """The largest between two tokens that are the same, up to where the answers part."""
        reference = next(iter(self.ways.values())).answers
        pairs = zip(reference, self.ways[name].answers, strict=True)
        gaps = [abs(a - b) for one, other in pairs for a, b in _shared(one, other)]
        return max(gaps, default=0.0)

    def table(self) -> Table:
        """A row a way."""
        columns = ("way", "prompts", "equal", "differs at", "margin there", "log-prob. off by", "touched")
        return Table(columns, tuple(map(self._row, self.ways)), f"Parity, margins up to {self.tolerance:g} allowed")

    def _row(self, name: str) -> tuple[Any, ...]:
        way = self.ways[name]
        if way.left_out:
            return name, way.left_out, "", "", "", "", ""
        first = self.first_difference(name)
        at, margin = ("", "") if first is None else (f"prompt {first[0]}, token {first[1]}", first[2])
        equal = len(way.answers) - len(list(self._differences(name)))
        return name, len(way.answers), equal, at, margin, self.logprob_difference(name), way.touched

    def _differences(self, name: str) -> Iterator[tuple[int, int, float]]:
        reference, way = next(iter(self.ways.values())), self.ways[name]
        if way.left_out:
            return
        for prompt, (one, other) in enumerate(zip(reference.answers, way.answers, strict=True)):
            if one.ids != other.ids:
                at = next((i for i, (a, b) in enumerate(zip(one.ids, other.ids, strict=False)) if a != b), -1)
                at = min(len(one.ids), len(other.ids)) if at < 0 else at
                yield prompt, at, one.margins[at] if at < len(one.margins) else float("inf")


def _shared(one: Heard, other: Heard) -> Iterator[tuple[float, float]]:
    for a, b, *found in zip(one.ids, other.ids, one.logprobs, other.logprobs, strict=False):
        if a != b:
            return
        yield found[0], found[1]


def tolerance_of(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


def parity(
    model: PreTrainedModel,
    recipe: Recipe | None,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    tolerance: float | None = None,
    more: Mapping[str, Runner] | None = None,
) -> Parity:
    """Greedy answers under a recipe in each way, compared with those of one prompt at a time with a growing cache.

    The ways are those of transformers, one prompt at a time, batched with padding on the left, with a static cache and
    without a cache, and `more`, such as `steer.engines.vllm.WAYS`. `tolerance` is in logits; left out, it is that of
    the model's dtype (`TOLERANCE`). Raises ValueError where there is no prompt, or the recipe touches no token.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, Recipe
    >>> from steer.engines import parity
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Add(Site(2, "resid_post"), torch.ones(96), 0.05)], scope="thinking")
    >>> found = parity(model, recipe, ["a 3 b +4 c *7", "a 3"], max_new_tokens=16)
    >>> found.holds, list(found.ways)
    (True, ['single', 'batched', 'static cache', 'no cache'])
    """
    if not prompts:
        raise ValueError("There is no prompt, so nothing to compare. Give at least one.")
    encoded = [encode_prompt(tokenizer_of(model), prompt) for prompt in prompts]
    tolerance = tolerance_of(model.dtype) if tolerance is None else tolerance
    ways: Mapping[str, Runner] = {
        "single": _one_by_one,
        "batched": _batched,
        "static cache": partial(_one_by_one, cache_implementation="static", disable_compile=True),
        "no cache": partial(_one_by_one, use_cache=False),
        **(more or {}),
    }
    return Parity({name: run(model, recipe, encoded, max_new_tokens) for name, run in ways.items()}, tolerance)


def _one_by_one(model: PreTrainedModel, recipe: Recipe | None, prompts: Sequence[Ids], n: int, **settings: Any) -> Way:
    with nullcontext() if recipe is None else applied(model, recipe) as log:
        answers = [answer for ids in prompts for answer in _asked(model, [ids], n, **settings)]
    return Way(tuple(answers), None if log is None or settings.get("use_cache") is False else log.tokens)


def _batched(model: PreTrainedModel, recipe: Recipe | None, prompts: Sequence[Ids], n: int) -> Way:
    with nullcontext() if recipe is None else applied(model, recipe) as log:
        answers = _asked(model, prompts, n)
    return Way(tuple(answers), None if log is None else log.tokens)


@torch.no_grad()
def _asked(model: PreTrainedModel, prompts: Sequence[Ids], n: int, **settings: Any) -> list[Heard]:
    """What transformers' own `generate` answers, side by side."""
    tokenizer, ends = tokenizer_of(model), end_ids(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(own)) + own for own in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompts], device=model.device)
    config = GenerationConfig(
        do_sample=False, temperature=1.0, top_p=1.0, top_k=50, max_new_tokens=n, eos_token_id=ends, pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=True, **settings,
    )  # fmt: skip
    write: Any = model.generate
    out = write(ids, attention_mask=mask, generation_config=config)
    logits: Tensor = torch.stack(out.logits, 1).float()
    new: list[Ids] = out.sequences[:, width:].tolist()
    return [_heard(own, logits[row], ends) for row, own in enumerate(new)]


def _heard(ids: Ids, logits: Tensor, ends: Ids) -> Heard:
    length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    ids, logits = ids[:length], logits[:length]
    top = logits.topk(2, dim=1).values
    said = logits.log_softmax(1)[torch.arange(length), torch.tensor(ids)]
    return Heard(ids, said.tolist(), (top[:, 0] - top[:, 1]).tolist())
