"""Strength against effect: fixed strengths, the best chosen on one split and reported on another, beside nulls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from probes.directions.direction import Direction, difference_in_means, random_direction
from probes.figures.plots import Point, arms_figure
from probes.generation.sampling import Sampling
from probes.late import go
from probes.model.sites import Site
from probes.tables import Brief, Shown, Table
from probes.thinking.spans import Span
from steer.evaluation._evaluate import evaluate, within
from steer.evaluation.evaluation import Evaluation
from steer.recipes.recipe import Recipe
from steer.runtime.calibration import calibrated, divergence
from steer.tasks.task import Problem, Task

MakeRecipe = Callable[[Direction, float], Recipe]


@dataclass(frozen=True, eq=False, repr=False)
class LabelledDirection(Brief):
    """A direction and the two classes it came from, so that its labels can be shuffled.

    `of` is the difference in means, positive less negative, at one site.

    >>> from probes import Site, load
    >>> from probes.thinking import text_span
    >>> from steer.evaluation import LabelledDirection
    >>> model = load("organism")
    >>> marked, others = ([text_span(model, f"{word} a {i}") for i in range(4)] for word in ("quick", "Wait"))
    >>> labelled = LabelledDirection.of(model, marked, others, Site(2, "resid_post"))
    >>> null = labelled.shuffled(model, seed=0)
    >>> round(labelled.direction.norm - null.norm, 3), null.provenance.estimator
    (0.0, 'difference in means, shuffled labels')
    """

    direction: Direction
    positive: tuple[Span, ...]
    negative: tuple[Span, ...]

    @classmethod
    def of(
        cls, model: PreTrainedModel, positive: Sequence[Span], negative: Sequence[Span], site: Site
    ) -> "LabelledDirection":
        direction = difference_in_means(model, positive, negative, [site])[site]
        return cls(direction, tuple(positive), tuple(negative))

    def shuffled(self, model: PreTrainedModel, *, seed: int) -> Direction:
        """The null: the same estimator on shuffled labels, scaled to the direction's norm."""
        spans = [*self.positive, *self.negative]
        order = torch.randperm(len(spans), generator=torch.Generator().manual_seed(seed)).tolist()
        mixed = [spans[i] for i in order]
        n, site = len(self.positive), self.direction.site
        null = difference_in_means(model, mixed[:n], mixed[n:], [site])[site]
        birth = null.provenance.made(f"{null.provenance.estimator}, shuffled labels", seed=seed)
        return replace(null, vector=null.unit * self.direction.norm, provenance=birth)


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(Shown):
    """`selection` holds the strengths on the split that chose; `report` those strengths and the nulls of the chosen
    one on problems that no choice saw. `kl` is what the chosen strength does to the next token, in nats.

    >>> from probes import Sampling, Site, load
    >>> from probes.thinking import text_span
    >>> from steer import Add, Recipe, task_named
    >>> from steer.evaluation import LabelledDirection, sweep
    >>> model, task = load("organism"), task_named("chains")
    >>> marked, others = ([text_span(model, f"{word} a {i}") for i in range(4)] for word in ("quick", "Wait"))
    >>> labelled = LabelledDirection.of(model, marked, others, Site(2, "resid_post"))
    >>> swept = sweep(
    ...     model, task, labelled, lambda d, strength: Recipe.of(model, [Add.of(d, strength)]), (0.5,),
    ...     select=task.sample(4, "select"), report=task.sample(4, "report"), judge=marked,
    ...     sampling=Sampling.of(model, max_new_tokens=48), draws=0,
    ... )
    >>> swept.strengths, list(swept.selection.arms), round(swept.kl, 2)
    ((0.5,), ['plain', 'strength +0.5'], 0.2)
    """

    strengths: tuple[float, ...]
    selected: float
    selection: Evaluation
    report: Evaluation
    kl: float

    def table(self) -> Table:
        table = self.report.table()
        return replace(table, title=f"{table.title}: strength {self.selected:g} chosen on the selection split")

    def figure(self) -> "go.Figure":
        """Accuracy against thinking length of every arm on the report split, with the Pareto front."""
        scores = {name: self.report.score(name) for name in self.report.arms}
        return arms_figure([Point(name, s.length, s.accuracy, s.interval) for name, s in scores.items()])


def sweep(
    model: PreTrainedModel,
    task: Task,
    contrast: LabelledDirection,
    make: MakeRecipe,
    strengths: Sequence[float],
    *,
    select: Sequence[Problem],
    report: Sequence[Problem],
    judge: Sequence[Span],
    sampling: Sampling,
    samples: int = 1,
    draws: int = 3,
    batch_size: int = 64,
    store: Path | None = None,
    seed: int = 0,
) -> Sweep:
    """Run `make(direction, strength)` at every strength; choose by accuracy on `select`; report everything on `report`.

    Nulls at the chosen strength, `draws` pooled: random directions of the same norm; directions of shuffled labels,
    at the same norm; random directions at the strength that moves the next token as far on `judge` as the chosen one
    does (same KL). With `store`, a folder, completions are kept there: a sweep that was killed, started again, goes on
    where it stopped. Raises ValueError where select and report share a problem.

    >>> from probes import Sampling, Site, load
    >>> from probes.thinking import text_span
    >>> from steer import Add, Recipe, task_named
    >>> from steer.evaluation import LabelledDirection, sweep
    >>> model, task = load("organism"), task_named("chains")
    >>> marked, others = ([text_span(model, f"{word} a {i}") for i in range(4)] for word in ("quick", "Wait"))
    >>> labelled = LabelledDirection.of(model, marked, others, Site(2, "resid_post"))
    >>> swept = sweep(
    ...     model, task, labelled, lambda d, strength: Recipe.of(model, [Add.of(d, strength)]), (0.25, 0.5),
    ...     select=task.sample(4, "select"), report=task.sample(4, "report"), judge=marked,
    ...     sampling=Sampling.of(model, max_new_tokens=48), draws=1,
    ... )
    >>> swept.selected, list(swept.report.arms)[1:]
    (0.25, ['strength +0.25', 'strength +0.5', 'random direction', 'shuffled labels', 'random direction, same KL'])
    """
    if shared := {p.id for p in select} & {p.id for p in report}:
        raise ValueError(f"{len(shared)} problems are in both splits, such as {min(shared)!r}: choose on others.")
    arms = {_name(strength): make(contrast.direction, strength) for strength in strengths}

    attempt = partial(evaluate, model, task, sampling=sampling, samples=samples, batch_size=batch_size)
    selection = attempt(select, arms, store=within(store, "select"))
    selected = max(strengths, key=lambda strength: selection.score(_name(strength)).accuracy)
    kl = divergence(model, arms[_name(selected)], judge)
    randoms = [random_direction(contrast.direction, seed=seed + i) for i in range(draws)]
    nulls = {
        "random direction": [make(direction, selected) for direction in randoms],
        "shuffled labels": [make(contrast.shuffled(model, seed=seed + i), selected) for i in range(draws)],
    }
    if kl > 0:
        nulls["random direction, same KL"] = [
            calibrated(model, make(direction, selected), judge, kl) for direction in randoms
        ]
    if not draws:
        nulls = {}
    return Sweep(
        tuple(strengths), selected, selection, attempt(report, {**arms, **nulls}, store=within(store, "report")), kl
    )


def _name(strength: float) -> str:
    return f"strength {strength:+g}"
