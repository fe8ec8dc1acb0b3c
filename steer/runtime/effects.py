"""What a recipe does to the next token: its distribution, and how far that is from the plain model's."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.model.loading import tokenizer_of
from probes.model.positions import rope_groups
from probes.model.tokens import Prompt, encode_prompt
from probes.tables import Brief, Shown, Table
from probes.thinking.spans import Span
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied


def prompt_spans(model: PreTrainedModel, prompts: Sequence[Prompt]) -> list[Span]:
    """The last token of each prompt, written by the chat template: what it predicts is the first new token.

    Raises ValueError where the tokenizer has no chat template.

    >>> from probes import load
    >>> from steer.runtime import prompt_spans
    >>> [(span.start, span.stop) for span in prompt_spans(load("organism"), ["a 3 b +4", "a 3 b +4 c *7"])]
    [(5, 6), (7, 8)]
    """
    rows = [tuple(encode_prompt(tokenizer_of(model), prompt)) for prompt in prompts]
    return [Span(ids, len(ids) - 1, len(ids)) for ids in rows]


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, spans: Sequence[Span], recipe: Recipe | None
) -> Float[Tensor, "batch pos d_vocab"]:
    """Of the next token at each position of each span, with the recipe or without; each span at the end of its row.

    In nats. `pos` is as long as the longest span; what stands before a shorter one means nothing.

    >>> from probes import load
    >>> from steer.runtime import log_probabilities, prompt_spans
    >>> model = load("organism")
    >>> log_probabilities(model, prompt_spans(model, ["a 3 b +4", "a 3 b +4 c *7"]), None).shape
    torch.Size([2, 1, 69])
    """
    rows, width = [span.ids[: span.stop] for span in spans], max(span.stop for span in spans)
    ids = torch.tensor([[row[0]] * (width - len(row)) + list(row) for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    longest = max(span.stop - span.start for span in spans)
    with nullcontext() if recipe is None else applied(model, recipe, must_fire=False):
        logits: Tensor = model(
            input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=longest
        ).logits
    return (logits if logits.device.type == "mps" else logits.double()).log_softmax(-1)


@dataclass(frozen=True, repr=False)
class Choice(Brief):
    """A prompt and the first tokens of its candidate answers; `correct` is an index into them.

    >>> from probes import load
    >>> from probes.model import tokenizer_of
    >>> from steer.runtime import Choice, prompt_spans
    >>> model = load("organism")
    >>> digits = tuple(tokenizer_of(model).convert_tokens_to_ids(list("0123456789")))
    >>> Choice(prompt_spans(model, ["a 3 b +4"])[0], digits, correct=7).candidates
    (14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
    """

    span: Span
    candidates: tuple[int, ...]
    correct: int


@dataclass(frozen=True)
class Effect:
    """At one strength, over prompts: mean and variance of KL(plain ‖ steered) in nats and of the entropy in bits; the
    mean share of the right answer among the candidates' probability, and how often it is the most likely of them.

    >>> from steer.runtime import Effect
    >>> Effect(strength=0.5, kl=(0.02, 0.0), entropy=(1.5, 0.1), mass=0.8, accuracy=0.9).accuracy
    0.9
    """

    strength: float
    kl: tuple[float, float]
    entropy: tuple[float, float]
    mass: float
    accuracy: float


@dataclass(frozen=True, repr=False)
class EffectCurve(Shown):
    """Effects over strengths, of `n` prompts. It shows itself as a table.

    >>> from steer.runtime import Effect, EffectCurve
    >>> EffectCurve((Effect(0.5, (0.02, 0.0), (1.5, 0.1), 0.8, 0.9),), n=20).table().title
    'First new token of 20 prompts'
    """

    effects: tuple[Effect, ...]
    n: int

    def table(self) -> Table:
        """A row for each strength."""
        columns = ("strength", "KL, nats", "variance", "entropy, bits", "variance ", "answer mass", "accuracy")
        rows = [(e.strength, *e.kl, *e.entropy, e.mass, e.accuracy) for e in self.effects]
        return Table(columns, tuple(rows), f"First new token of {self.n} prompts")


def effect_curve(
    model: PreTrainedModel,
    recipe_at: Callable[[float], Recipe],
    choices: Sequence[Choice],
    strengths: Sequence[float],
    *,
    batch_size: int = 32,
) -> EffectCurve:
    """The first new token's distribution at each strength (the metrics of Højer et al. 2025), in padded batches.

    Answers are told by their first tokens alone: raises ValueError where two candidates of a prompt share one, or where
    there are no prompts.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, Recipe
    >>> from steer.runtime import Choice, effect_curve, prompt_spans
    >>> model, site = load("organism"), Site(3, "resid_post")
    >>> choices = [Choice(span, (3, 56), correct=0) for span in prompt_spans(model, ["a 3 b +4 c *7"])]
    >>> curve = effect_curve(model, lambda s: Recipe.of(model, [Add(site, torch.arange(96.0), s)]), choices, [0.0, 0.5])
    >>> [(effect.strength, round(effect.kl[0], 2)) for effect in curve.effects]
    [(0.0, 0.0), (0.5, 0.09)]
    """
    if not choices:
        raise ValueError("A curve is measured on prompts, but none was given.")
    for number, choice in enumerate(choices):
        if len(set(choice.candidates)) < len(choice.candidates):
            raise ValueError(
                f"Two candidate answers of prompt {number} begin with one token, and cannot be told apart."
            )
    together = rope_groups(model, [len(choice.span.ids) for choice in choices])
    batches = [
        [choices[i] for i in group[start : start + batch_size]]
        for group in together
        for start in range(0, len(group), batch_size)
    ]
    recipes, found = [recipe_at(strength) for strength in strengths], [list[Tensor]() for _ in strengths]
    for batch in batches:
        spans = [choice.span for choice in batch]
        plain = log_probabilities(model, spans, None)[:, -1]
        for rows, recipe in zip(found, recipes, strict=True):
            rows.append(_measured(plain, log_probabilities(model, spans, recipe)[:, -1], batch))
    return EffectCurve(
        tuple(_effect(s, torch.cat(rows)) for s, rows in zip(strengths, found, strict=True)), len(choices)
    )


def _measured(
    plain: Float[Tensor, "batch d_vocab"], steered: Float[Tensor, "batch d_vocab"], batch: Sequence[Choice]
) -> Float[Tensor, "batch 4"]:
    """Of each prompt its KL in nats, its entropy in bits, the right answer's share, and 1 where that is the largest."""
    kl = (plain.exp() * (plain - steered)).sum(-1)
    entropy = -(steered.exp() * steered).sum(-1) / math.log(2)
    among = [row[list(choice.candidates)].softmax(-1) for row, choice in zip(steered, batch, strict=True)]
    mass = torch.stack([shares[choice.correct] for shares, choice in zip(among, batch, strict=True)])
    hits = [int(shares.argmax()) == choice.correct for shares, choice in zip(among, batch, strict=True)]
    return torch.stack([kl, entropy, mass, torch.tensor(hits).to(mass)], dim=1)


def _effect(strength: float, rows: Float[Tensor, "prompts 4"]) -> Effect:
    kl, entropy, mass, hits = rows.mean(0).tolist()
    variances = rows.var(0, unbiased=False).tolist()
    return Effect(strength, (kl, variances[0]), (entropy, variances[1]), mass, hits)
