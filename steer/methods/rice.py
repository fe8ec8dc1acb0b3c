"""RICE: find the few experts that go with the start of thinking, and reinforce them (Wang et al. 2025).

arXiv 2505.14681. Experts are scored by nPMI with `<think>`, less that with `</think>` and with "Alternatively" (see
`probes.evidence.association`); the paper reinforces the top 2 by 64, both numbers chosen on a set that is among those
reported. No code of it is public, and all that is known of it here is second-hand, so no fidelity is claimed. Here the
choice is made on one split and reported on another, beside what is not known of the paper: experts of about the same
load drawn at random, those with the lowest score, the weights normalised again, decoding controls, and intervals.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from probes.activations.experts import ExpertCounts, read_experts
from probes.evidence.association import Association, associate
from probes.figures.experts import doses_figure
from probes.figures.plots import Dose
from probes.generation.sampling import Sampling
from probes.late import go
from probes.model.loading import delimiters_of, load, tokenizer_of
from probes.model.routers import Expert
from probes.model.tokens import decode
from probes.tables import Shown, Table
from steer.checkpoints._diff import Difference
from steer.checkpoints.card import Section
from steer.decoding.control import DecodingControl
from steer.evaluation._evaluate import Arm, evaluate, solve, within
from steer.evaluation.evaluation import Evaluation
from steer.evaluation.selection import Selection, select
from steer.evaluation.statistics import interval_of_mean
from steer.evaluation.verdicts import verdicts_on
from steer.folding._export import export
from steer.interventions.routing import Reinforce
from steer.recipes.recipe import Recipe
from steer.recipes.scope import Scope
from steer.tasks.named import task_named
from steer.tasks.task import Task

METHOD = "RICE (Wang et al. 2025)"
TOP, STRENGTHS = (2,), (2.0, 4.0, 8.0, 16.0, 64.0)


@dataclass(frozen=True)
class RiceSetting:
    """How many of the highest-scored experts, and by how much their routing weights are multiplied.

    >>> from steer.methods.rice import RiceSetting
    >>> str(RiceSetting(top=2, strength=64.0))
    'top 2 × 64'
    """

    top: int
    strength: float

    def __str__(self) -> str:
        return f"top {self.top} × {self.strength:g}"


def signed_markers(model: PreTrainedModel) -> dict[str, float]:
    """The paper's markers, in the delimiters of the model: what opens the thinking +1, what closes it -1, and
    `Alternatively` -1. Raises ValueError for a model without thinking delimiters.

    >>> from probes import load
    >>> from steer.methods.rice import signed_markers
    >>> signed_markers(load("organism"))
    {'<think>': 1.0, '</think>': -1.0, 'Alternatively': -1.0}
    """
    delimiters = delimiters_of(model)
    opens, closes = (decode(tokenizer_of(model), ids) for ids in (delimiters.open, delimiters.close))
    return {opens: 1.0, closes: -1.0, "Alternatively": -1.0}


def recipe(
    model: PreTrainedModel,
    experts: Sequence[Expert],
    strength: float,
    *,
    scope: str | Scope = "all",
    renormalise: bool = False,
) -> Recipe:
    """The recipe that reinforces these experts. At scope `all`, not renormalised, it folds into weights.

    `strength` multiplies their routing weights.

    >>> from probes import load
    >>> from steer.methods import rice
    >>> model = load("organism")
    >>> print(rice.recipe(model, [(2, 1), (3, 0)], 64.0))
          RICE (Wang et al. 2025), made on organism
    ┏━━━━━━┳━━━━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━┳━━━━━━━━━━┓
    ┃ step ┃ kind      ┃ site         ┃ scope ┃ strength ┃
    ┡━━━━━━╇━━━━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━╇━━━━━━━━━━┩
    │    0 │ reinforce │ L2E1.routing │ all   │       64 │
    │    1 │ reinforce │ L3E0.routing │ all   │       64 │
    └──────┴───────────┴──────────────┴───────┴──────────┘
    """
    edits = [Reinforce.of(expert, strength, renormalise=renormalise) for expert in experts]
    return Recipe.of(model, edits, scope=scope, method=METHOD)


@dataclass(frozen=True, eq=False, repr=False)
class RiceRun(Shown):
    """A RICE from end to end. `selection` chose among the settings; `report` saw none of its problems.

    >>> from steer.methods.rice import rice
    >>> run = rice("organism", strengths=(2.0,), n_probe=4, n_select=2, n_report=2, draws=1, minimum=1)
    >>> list(run.report.arms), run.report.score("plain").accuracy
    (['plain', 'top 2 × 2', 'top 2 × 2, renormalised', 'random experts × 2', 'lowest scores × 2'], 1.0)
    """

    model: PreTrainedModel
    task: Task
    sampling: Sampling
    load: ExpertCounts
    association: Association
    selected: RiceSetting
    recipe: Recipe
    selection: Selection
    report: Evaluation

    @property
    def experts(self) -> list[Expert]:
        return self.association.top(self.selected.top)

    def export(self, folder: str | Path) -> Difference:
        """Write the model with the experts reinforced as an ordinary checkpoint, whose card holds the tables.

        Raises NotFoldable for a recipe that no weights equal, as one of another scope than `all`.
        """
        a = self.association
        marked = ", ".join(f"{sign:+g} {marker} ({a.occurrences[marker]} times)" for marker, sign in a.signs.items())
        left = f" Left out, as they never occur: {', '.join(a.left_out)}." if a.left_out else ""
        words = (
            f"Score: sum of sign × nPMI over {marked}, among {a.tokens} tokens.{left} Setting: {self.selected}, chosen "
            f"by accuracy among {self.selection.n_settings} on a split of its own. Sampling: {self.sampling}."
        )
        sections = [
            Section("Verdict", " ".join(verdicts_on(self.report, str(self.selected)))),
            Section("Before and after", "On problems that no selection saw, paired by problem.", self.report.table()),
            Section("Experts", words, a.table()),
            Section("Selection", "All settings, each in its last round.", self.selection.table()),
        ]
        return export(
            self.model, self.recipe, folder, sections=sections, extras={"rice.json": json.dumps(self.to_dict()) + "\n"}
        )

    def figure(self) -> "go.Figure":
        """Thinking tokens and accuracy on the report split against the strength, beside the nulls of the chosen."""
        strength, top = self.selected.strength, f"top {self.selected.top} × "
        doses = [arm for arm in self.report.arms if arm.startswith(top) and "," not in arm]
        series = {"highest scores": [_dose(self.report, arm, float(arm.removeprefix(top))) for arm in doses]}
        for name in (
            f"{self.selected}, renormalised",
            f"random experts × {strength:g}",
            f"lowest scores × {strength:g}",
        ):
            if name in self.report.arms:
                series[name] = [_dose(self.report, name, strength)]
        return doses_figure(series, plain=_dose(self.report, "plain", 1.0))

    def table(self) -> Table:
        return self.report.table()

    def _repr_html_(self) -> str:
        return self.association._repr_html_() + self.report._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        a = self.association
        return {
            "selected": {"top": self.selected.top, "strength": self.selected.strength},
            "experts": [f"L{layer}E{expert}" for layer, expert in self.experts],
            "scores": [float(a.score[a.layers.index(layer), expert]) for layer, expert in self.experts],
            "markers": a.signs,
            "left_out": list(a.left_out),
            "selection": self.selection.to_dict(),
            "report": self.report.to_dict(),
        }


def rice(
    model: str | PreTrainedModel,
    task: str | Task = "chains",
    *,
    signs: Mapping[str, float] | None = None,
    top: Sequence[int] = TOP,
    strengths: Sequence[float] = STRENGTHS,
    scope: str | Scope = "all",
    controls: Mapping[str, DecodingControl] | None = None,
    n_probe: int = 300,
    n_select: int = 400,
    n_report: int = 1000,
    samples: int = 1,
    draws: int = 3,
    minimum: int = 10,
    sampling: Sampling | None = None,
    batch_size: int = 64,
    store: Path | None = None,
    seed: int = 0,
) -> RiceRun:
    """Score experts on completions of *probe* problems, choose how many and how strongly by accuracy on *select*
    problems, and measure on *report* problems, beside the nulls.

    `signs` are the markers and their signs, `signed_markers` where not given. Reported at every strength: the chosen
    number of experts. At the chosen strength: the same with the weights normalised again, as many experts matched for
    load (`draws` of them, pooled), and the lowest-scored ones. `controls` decide over tokens beside the plain model.
    With `store`, a folder, completions are kept there, and a run that was killed goes on where it stopped. Raises
    ValueError for a model whose routing cannot be read, and where no marker occurs.

    >>> from steer.methods.rice import rice
    >>> run = rice("organism", strengths=(2.0,), n_probe=4, n_select=2, n_report=2, draws=1, minimum=1)
    >>> str(run.selected), run.experts
    ('top 2 × 2', [(3, 2), (2, 7)])
    """
    model = load(model) if isinstance(model, str) else model
    task = task_named(task) if isinstance(task, str) else task
    sampling = sampling or Sampling.of(model, max_new_tokens=task.max_new_tokens, seed=seed)
    stored = partial(within, store)
    compare = partial(evaluate, model, task, samples=samples, sampling=sampling, batch_size=batch_size)
    signs = signed_markers(model) if signs is None else signs
    probed = solve(
        model, task.sample(n_probe, "probe", seed=seed), sampling=sampling, batch_size=batch_size,
        store=stored("probe.jsonl"), label="probing",
    )  # fmt: skip
    reading = read_experts(model, probed, tuple(signs))
    association = associate(reading, signs, minimum=minimum, seed=seed)

    settings = [RiceSetting(count, strength) for count, strength in product(top, strengths)]
    recipes = {s: recipe(model, association.top(s.top), s.strength, scope=scope) for s in settings}
    tried = {str(setting): setting for setting in settings}
    selection = select(
        model, task, task.sample(n_select, "select", seed=seed), {name: recipes[s] for name, s in tried.items()},
        sampling=sampling, samples=samples, batch_size=batch_size, store=stored("select"),
    )  # fmt: skip
    selected = tried[selection.best()[0]]

    shown: dict[str, Arm] = {str(s): recipe for s, recipe in recipes.items() if s.top == selected.top}
    other = nulls(model, association, selected, scope=scope, draws=draws, seed=seed)
    report = compare(
        task.sample(n_report, "report", seed=seed), {**shown, **(controls or {}), **other}, store=stored("report")
    )
    return RiceRun(
        model, task, sampling, reading.total(), association, selected, recipes[selected], selection, report
    )  # fmt: skip


def nulls(
    model: PreTrainedModel,
    association: Association,
    setting: RiceSetting,
    *,
    scope: str | Scope = "all",
    draws: int = 3,
    seed: int = 0,
) -> dict[str, list[Recipe]]:
    """What a setting is compared with, at its strength: by name, recipes that are draws of one null.

    >>> from probes import Sampling, load
    >>> from probes.activations import read_experts
    >>> from probes.evidence import associate
    >>> from steer import task_named
    >>> from steer.evaluation import solve
    >>> from steer.methods import rice
    >>> model = load("organism")
    >>> problems, sampling = task_named("chains").sample(6, "probe"), Sampling.of(model, max_new_tokens=48)
    >>> completions = solve(model, problems, sampling=sampling)
    >>> signs = rice.signed_markers(model)
    >>> association = associate(read_experts(model, completions, tuple(signs)), signs, minimum=1)
    >>> {name: len(draws) for name, draws in rice.nulls(model, association, rice.RiceSetting(2, 8.0)).items()}
    {'top 2 × 8, renormalised': 1, 'random experts × 8': 3, 'lowest scores × 8': 1}
    """
    experts = association.top(setting.top)
    make = partial(recipe, model, strength=setting.strength, scope=scope)
    lowest = [expert for expert in association.bottom(setting.top) if expert not in experts]
    recipes = {
        f"{setting}, renormalised": [make(experts, renormalise=True)],
        f"random experts × {setting.strength:g}": [
            make(association.matched(experts, seed=seed + i)) for i in range(draws)
        ],
        f"lowest scores × {setting.strength:g}": [make(lowest)] if lowest else [],
    }
    return {name: drawn for name, drawn in recipes.items() if drawn}


def _dose(evaluation: Evaluation, arm: str, strength: float) -> Dose:
    """What an arm did, as a point of `probes.figures.experts.doses_figure`."""
    score, lengths = evaluation.score(arm), evaluation.arms[arm].length.mean(1).astype(float)
    return Dose(
        strength, score.length, interval_of_mean(lengths), score.accuracy, score.interval, score.truncation
    )  # fmt: skip
