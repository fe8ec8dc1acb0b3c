"""The main job: probe a model, derive edits, choose one, and report it beside its nulls, on three splits."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from probes.activations.heads import Head
from probes.directions.direction import Direction
from probes.evidence._separation import separation
from probes.generation.completions import Completion
from probes.generation.sampling import Sampling
from probes.model.architectures import n_heads, n_layers
from probes.model.loading import load
from probes.tables import Shown, Table
from steer.checkpoints._diff import Difference
from steer.checkpoints.card import Section
from steer.evaluation._evaluate import Arm, Shared, evaluate, solve, within
from steer.evaluation.evaluation import Evaluation
from steer.evaluation.selection import Selection, select
from steer.evaluation.verdicts import verdicts_on
from steer.folding._export import export
from steer.folding._fold import check_folds, fold_error, folded
from steer.folding.draft import NotFoldable
from steer.methods.thinkedit import (
    PUBLISHED,
    Kind,
    LengthReading,
    LengthSplit,
    Position,
    Ranking,
    ThinkEditSetting,
    n_edited,
)
from steer.recipes.recipe import Recipe
from steer.tasks.named import task_named
from steer.tasks.task import Task

KINDS: tuple[Kind, ...] = get_args(Kind)
POSITIONS: tuple[Position, ...] = get_args(Position)
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)
HEAD_SHARES = (0.03, 0.06, 0.125)


def grid(heads: Iterable[float] = HEAD_SHARES, kinds: Iterable[Kind] = KINDS) -> tuple[ThinkEditSetting, ...]:
    """Every kind, position, ranking and head count: what the selection split chooses from.

    >>> from steer.methods.thinkedit_run import grid
    >>> settings = grid(heads=(0.06,), kinds=("project",))
    >>> len(settings), str(settings[0])
    (4, 'project, thinking position, raw ranking, 6% of the heads')
    """
    return tuple(
        ThinkEditSetting(kind, position, ranking, k)
        for k, kind, position, ranking in product(heads, kinds, POSITIONS, RANKINGS)
    )


@dataclass(frozen=True, eq=False, repr=False)
class ThinkEditRun(Shown):
    """A ThinkEdit from end to end: what was derived, chosen and measured. `report` saw no problem twice.

    >>> from steer import thinkedit
    >>> from steer.methods.thinkedit import PUBLISHED
    >>> run = thinkedit("organism", settings=[PUBLISHED], n_probe=40, n_select=2, n_report=12, control_draws=1)
    >>> str(run.selected), str(run.direction.site), run.fold_error() < 1e-4
    ('project, thinking position, raw ranking, 6% of the heads', 'L0.resid_mid', True)
    """

    model: PreTrainedModel
    task: Task
    sampling: Sampling
    readings: Mapping[Position, LengthReading]
    selected: ThinkEditSetting
    recipe: Recipe
    heads: tuple[Head, ...]
    selection: Selection
    report: Evaluation
    auroc: float

    @property
    def direction(self) -> Direction:
        """The length direction in the layer of the head that scores highest."""
        return self.readings[self.selected.position].directions[self.heads[0][0]]

    def export(self, folder: str | Path, *, extras: Mapping[str, str] | None = None) -> Difference:
        """Write the chosen edit as an ordinary checkpoint, whose card holds the tables. See `steer.folding.export`.

        `extras` are further text files, by name; `steer.report.save` hands in the record that a report is made of.
        """
        d, p = self.direction, self.direction.provenance
        birth = (
            f"Length direction at {d.site}: {p.estimator}, {p.n_positive} long less {p.n_negative} short completions, "
            f"norm {d.norm / d.stream_norm:.2f} of the stream's, AUROC {self.auroc:.3f} on held-out completions. "
            f"Setting: {self.selected}, chosen by accuracy among {self.selection.n_settings} on a split of its own. "
            f"Sampling: {self.sampling}. Versions: {p.versions}. Data: {p.data}."
        )
        sections = [
            Section("Verdict", " ".join(verdicts_on(self.report, "edited"))),
            Section("Before and after", "On problems that no selection saw, paired by problem.", self.report.table()),
            Section("Provenance", birth),
            Section("Selection", "All settings, each in its last round.", self.selection.table()),
        ]
        return export(self.model, self.recipe, folder, sections=sections, extras=extras)

    def fold_error(self) -> float:
        """The largest difference of a logit between the folded and the steered model, over 64 completions."""
        split = self.readings[self.selected.position].split
        rows = [c.all_ids for c in (*split.short[:32], *split.long[:32])]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
        return fold_error(self.model, folded(self.model, self.recipe), self.recipe, ids, mask)

    def table(self) -> Table:
        return self.report.table()

    def _repr_html_(self) -> str:
        return self.direction._repr_html_() + self.recipe._repr_html_() + self.report._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        d = self.direction
        return {
            "direction": {
                "auroc": self.auroc,
                "layer": d.site.layer,
                "norm_over_stream_norm": d.norm / d.stream_norm,
            },
            "heads": [f"L{layer}H{head}" for layer, head in self.heads],
            "setting": str(self.selected),
            **self.report.to_dict(),
            "max_logit_diff_fold_vs_hook": self.fold_error(),
        }


def thinkedit(
    model: str | PreTrainedModel,
    task: str | Task = "chains",
    *,
    cutoffs: tuple[float, float] | None = None,
    share: float = 0.25,
    settings: Sequence[ThinkEditSetting] | None = None,
    n_probe: int = 1000,
    n_select: int = 400,
    n_report: int = 1000,
    samples: int = 1,
    control_draws: int = 5,
    sampling: Sampling | None = None,
    batch_size: int = 64,
    store: Path | None = None,
    seed: int = 0,
) -> ThinkEditRun:
    """ThinkEdit (Sun et al. 2025) on a model and a task, beside its nulls.

    Three splits that share no problem: completions of the *probe* problems give directions and heads; the best of
    `settings` that folds is chosen by accuracy on the *select* problems, in rounds (`steer.evaluation.select`); every
    arm is measured on the *report* problems. Short and long are cut at `cutoffs` thinking tokens (the paper's are 100
    and 1000), or else at the quantiles `share` and 1 - `share`. Arms: plain, published, edited, the best one-sided
    (run time only), and as nulls the same edit on random heads, on the lowest-scored heads, and along random
    directions; `control_draws` of each random one share the problems out among them. With `store`, a folder,
    completions are kept there: a run that was killed, started again, goes on where it stopped.

    Raises ValueError where a class is too small, the model has no thinking delimiters, or its family is unknown.

    >>> from steer import thinkedit
    >>> from steer.methods.thinkedit import PUBLISHED
    >>> run = thinkedit("organism", settings=[PUBLISHED], n_probe=40, n_select=2, n_report=12, control_draws=1)
    >>> run.heads, list(run.report.arms)
    (((0, 6), (0, 0)), ['plain', 'published', 'edited', 'lowest_heads', 'random_heads', 'random_direction'])
    """
    model = load(model) if isinstance(model, str) else model
    task = task_named(task) if isinstance(task, str) else task
    sampling = sampling or Sampling.of(model, max_new_tokens=task.max_new_tokens, seed=seed)
    settings = settings or grid()
    for setting in settings:  # before anything is generated
        n_edited(setting.heads, n_layers(model) * n_heads(model))
    stored = partial(within, store)
    attempt = partial(solve, model, sampling=sampling, batch_size=batch_size)
    compare = partial(evaluate, model, task, samples=samples, sampling=sampling, batch_size=batch_size)
    probed = attempt(task.sample(n_probe, "probe", seed=seed), label="probing", store=stored("probe.jsonl"))
    split = _split(probed, cutoffs, share)
    readings = {position: LengthReading.of(model, split, position=position) for position in POSITIONS}

    recipes = {setting: readings[setting.position].recipe(setting) for setting in settings}
    problems = task.sample(n_select, "select", seed=seed)
    tried = {str(setting): setting for setting in settings}
    selection = select(
        model, task, problems, {name: recipes[setting] for name, setting in tried.items()},
        kinds={name: setting.kind for name, setting in tried.items()}, sampling=sampling, samples=samples,
        batch_size=batch_size, store=stored("select"),
    )  # fmt: skip
    best = [tried[name] for name in selection.best()]
    selected = _first_that_folds(model, best, recipes)
    one_sided = next((setting for setting in best if setting.kind == "one_sided"), None)

    problems = task.sample(n_report, "report", seed=seed)
    plain = attempt(problems, samples=samples, label="plain", store=stored("plain.jsonl"))
    reading = readings[selected.position]
    arms: dict[str, Arm] = {
        "published": readings[PUBLISHED.position].recipe(PUBLISHED),
        "edited": recipes[selected],
        **({} if one_sided is None else {"one_sided": recipes[one_sided]}),
        "lowest_heads": _edit(reading, reading.scores(selected.ranking).bottom(len(reading.heads(selected))), selected),
        **_nulls(reading, selected, control_draws, seed),
    }
    report = compare(problems, arms, baseline=plain, store=stored("report"))
    heads = tuple(reading.heads(selected))
    held_out = _held_out(plain, split)
    auroc = separation(model, [reading.directions[heads[0][0]]], *reversed(held_out.spans(selected.position)))[0]
    return ThinkEditRun(model, task, sampling, readings, selected, recipes[selected], heads, selection, report, auroc)


def _split(completions: Sequence[Completion], cutoffs: tuple[float, float] | None, share: float) -> LengthSplit:
    if cutoffs is None:
        return LengthSplit.by_quantile(completions, share=share)
    return LengthSplit.at(completions, below=cutoffs[0], above=cutoffs[1])


def _held_out(completions: Sequence[Completion], split: LengthSplit) -> LengthSplit:
    return LengthSplit.at(completions, below=split.below, above=split.above, minimum=2)


def _first_that_folds(
    model: PreTrainedModel, best: Sequence[ThinkEditSetting], recipes: Mapping[ThinkEditSetting, Recipe]
) -> ThinkEditSetting:
    for setting in best:
        try:
            check_folds(model, recipes[setting])
        except NotFoldable:
            continue
        return setting
    raise NotFoldable("None of the settings folds into weights: add one of kind 'project'.")


def _edit(reading: LengthReading, heads: Sequence[Head], setting: ThinkEditSetting) -> Recipe:
    return reading.edit(heads, kind=setting.kind, weight=setting.weight)


def _nulls(reading: LengthReading, selected: ThinkEditSetting, draws: int, seed: int) -> dict[str, Shared]:
    """The chosen edit on heads drawn from the others, and on the chosen heads along random directions."""
    heads = reading.heads(selected)
    others = [head for head in reading.scores().top(reading.short_writes.numel()) if head not in heads]
    rng = random.Random(seed)
    chosen = [rng.sample(others, min(len(heads), len(others))) for _ in range(draws)]
    return {
        "random_heads": Shared([_edit(reading, which, selected) for which in chosen]),
        "random_direction": Shared([_edit(reading.at_random(seed + i), heads, selected) for i in range(draws)]),
    }
