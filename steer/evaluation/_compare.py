"""Plain and steered completions of the same prompts side by side, with what the recipe touched."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from html import escape

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.generation._generate import generate
from probes.generation.completions import Completion
from probes.generation.sampling import Sampling
from probes.model.architectures import width_of
from probes.model.hooks import captured, forward_through
from probes.model.loading import tokenizer_of
from probes.model.sites import Site
from probes.model.tokens import Prompt, check_prompts, pieces
from probes.tables import Shown, Table
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied
from steer.runtime.firelog import FireLog


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Shown):
    """For each prompt its plain and its steered completion, drawn with the same noise.

    `projections` of each completion's tokens are on the recipe's first vector in the residual stream, at its site, in
    units of the vector's length: what the model held there, steered or not.

    >>> import torch
    >>> from probes import Sampling, Site, load
    >>> from steer import Add, Recipe, compare
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Add(Site(1, "resid_post"), torch.ones(96), 0.5)])
    >>> comparison = compare(model, recipe, ["a 3 b +4 c *7"], sampling=Sampling.of(model, max_new_tokens=48))
    >>> comparison.site, [len(values) for values in comparison.projections[0]]
    (Site(layer=1, name='resid_post', head=None, expert=None), [13, 13])
    >>> comparison.table().columns
    ('prompt', 'plain', 'steered', 'thinking tokens', 'steered ')
    """

    plain: tuple[Completion, ...]
    steered: tuple[Completion, ...]
    fired: FireLog
    site: Site | None
    projections: tuple[tuple[list[float], list[float]], ...]
    tokens: tuple[tuple[list[str], list[str]], ...]

    def table(self) -> Table:
        rows = [
            (a.id, _said(a), _said(b), a.thinking_tokens, b.thinking_tokens)
            for a, b in zip(self.plain, self.steered, strict=True)
        ]
        return Table(("prompt", "plain", "steered", "thinking tokens", "steered "), tuple(rows), "Side by side")

    def _repr_html_(self) -> str:
        values = sorted(abs(x) for pair in self.projections for side in pair for x in side)
        scale = values[int(0.95 * (len(values) - 1))] if values else 1.0
        rows = []
        for i, (a, b) in enumerate(zip(self.plain, self.steered, strict=True)):
            cells = "".join(
                f"<td style='{_CELL}'>{_coloured(tokens, shades, scale)}</td>"
                for tokens, shades in zip(self.tokens[i], self.projections[i], strict=True)
            )
            lengths = f"{a.thinking_tokens} and {b.thinking_tokens} thinking tokens"
            rows.append(f"<tr><th>{escape(a.id)}<br><small>{lengths}</small></th>{cells}</tr>")
        where = "" if self.site is None else _legend(self.site, scale)
        head = "<tr><th></th><th>plain</th><th>steered</th></tr>"
        return f"{where}<table>{head}{''.join(rows)}</table>{self.fired._repr_html_()}"


def compare(
    model: PreTrainedModel,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling | None = None,
    batch_size: int = 16,
) -> Comparison:
    """Complete each prompt without the recipe and with it. Raises ValueError for another model's recipe, and
    `NeverFired` where it touches nothing.

    >>> import torch
    >>> from probes import Sampling, Site, load
    >>> from steer import Add, Recipe, compare
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Add(Site(1, "resid_post"), torch.ones(96), 0.5)])
    >>> comparison = compare(model, recipe, ["a 3 b +4 c *7"], sampling=Sampling.of(model, max_new_tokens=48))
    >>> [arm[0].answer for arm in (comparison.plain, comparison.steered)]
    ['9', '9']
    """
    check_prompts(prompts)
    names = [prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) for prompt in prompts]
    ids = [f"{i}: {name[:60]}" for i, name in enumerate(names)]
    plain = generate(model, prompts, ids=ids, sampling=sampling, batch_size=batch_size, label="plain")
    with applied(model, recipe) as fired:
        steered = generate(model, prompts, ids=ids, sampling=sampling, batch_size=batch_size, label="steered")
    site, vector = _shown(model, recipe)
    sides = [
        [_projections(model, c, site, vector, with_recipe) for c in arm]
        for arm, with_recipe in ((plain, None), (steered, recipe))
    ]
    tokenizer = tokenizer_of(model)
    texts = [[pieces(tokenizer, c.ids) for c in arm] for arm in (plain, steered)]
    pairs = tuple(zip(*sides, strict=True))
    return Comparison(tuple(plain), tuple(steered), fired, site, pairs, tuple(zip(*texts, strict=True)))


def _shown(model: PreTrainedModel, recipe: Recipe) -> tuple[Site | None, Tensor | None]:
    for step in recipe.steps:
        site, vector = step.intervention.site, step.intervention.vector
        if vector is not None and site.head is None and len(vector) == width_of(model, Site(0, "resid_post")):
            return site, vector
    return None, None


@torch.no_grad()
def _projections(
    model: PreTrainedModel,
    c: Completion,
    site: Site | None,
    vector: Float[Tensor, " width"] | None,
    recipe: Recipe | None,
) -> list[float]:
    """Of each token of the completion, not of the prompt."""
    if site is None or vector is None:
        return []
    ids = torch.tensor([c.all_ids], device=model.device)
    with nullcontext() if recipe is None else applied(model, recipe, must_fire=False), captured(model, [site]) as seen:
        forward_through(model, site.layer, ids, torch.ones_like(ids))
    unit = (vector / vector.norm()).to(seen[site].device, torch.float32)
    out: list[float] = (seen[site][0, len(c.prompt_ids) :].float() @ unit).tolist()
    return out


def _said(c: Completion) -> str:
    return f"{c.thinking or ''} | {c.answer}" if c.thinking is not None else c.answer


def _coloured(tokens: Sequence[str], shades: Sequence[float], scale: float) -> str:
    """The text as it was written, its tokens as spans that touch."""
    spans = []
    for i, token in enumerate(tokens):
        value = max(-1.0, min(1.0, shades[i] / (scale or 1.0))) if shades else 0.0
        title = f" title='{shades[i]:.3g}'" if shades else ""
        spans.append(f"<span style='background:{_colour(value)}'{title}>{escape(token)}</span>")
    return "".join(spans)


def _legend(site: Site, scale: float) -> str:
    stops = ", ".join(map(_colour, (-1.0, 0.0, 1.0)))
    bar = f"display:inline-block;width:12em;height:.8em;margin:0 .5em;background:linear-gradient(90deg, {stops})"
    return f"<p>Coloured by the projection at {site}: {-scale:.3g}<span style='{bar}'></span>{scale:+.3g}</p>"


def _colour(value: float) -> str:
    """As in the report: orange above 0, blue below."""
    return f"rgba({_ABOVE if value > 0 else _BELOW},{0.6 * abs(value):.2f})"


_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:break-word;max-width:40em"
_ABOVE, _BELOW = "217,131,36", "61,133,198"
