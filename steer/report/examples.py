"""Completions of the plain and of the edited model side by side, with each token's projection on the direction."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from transformers import PreTrainedModel

from probes.directions.direction import Direction
from probes.evidence._separation import project
from probes.generation.completions import Completion
from probes.model.hooks import captured, forward_through
from probes.model.loading import tokenizer_of
from probes.model.tokens import decode
from probes.thinking.spans import POSITIONS
from steer.evaluation._evaluate import solve
from steer.evaluation.evaluation import Evaluation
from steer.methods.thinkedit_run import ThinkEditRun
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied
from steer.tasks.grading import is_correct
from steer.tasks.task import Problem

SHOWN = 600  # tokens of a completion: more are counted, not kept
KINDS = (
    "repaired: wrong before the edit, right after it",
    "unchanged: right before the edit and after it",
    "not repaired: wrong after the edit",
)
RULE = (
    "The first problem of each kind in the order of the report split, sample 0; where the task marks problems, the "
    "repaired one is the first marked one, and the unchanged one the first that is not marked."
)


@dataclass(frozen=True)
class SideRecord:
    """A completion: its tokens, prompt included, and each one's projection less the midpoint of the classes.

    `read` is the range of tokens that the direction was read at, empty where nothing was thought; of a long completion,
    `left_out` tokens are not kept.
    """

    correct: bool
    thinking_tokens: int
    truncated: bool
    left_out: int
    prompt_tokens: int
    read: tuple[int, int]
    tokens: tuple[str, ...]
    projections: tuple[float, ...]


@dataclass(frozen=True)
class ExampleRecord:
    """One problem, solved by the plain and by the edited model."""

    kind: str
    problem: str
    answer: str
    subgroup: str | None
    plain: SideRecord = field(metadata={"where": "The {key} side of {whole}"})
    edited: SideRecord = field(metadata={"where": "The {key} side of {whole}"})


@dataclass(frozen=True)
class CompletionsRecord:
    """One problem of each kind; `scale` is the projection of a class' mean, from `midpoint`, half way between them."""

    rule: str
    site: str
    midpoint: float
    scale: float
    examples: tuple[ExampleRecord, ...] = field(metadata={"where": "Example {key} of the record"})

    @classmethod
    def of(cls, run: ThinkEditRun) -> "CompletionsRecord":
        """Problems of the report split, solved again by both models: the noise is the problem's own."""
        direction, split = run.direction, run.readings[run.selected.position].split
        short, long = (
            float(project(run.model, spans, [direction]).mean()) for spans in split.spans(run.selected.position)
        )
        midpoint = (short + long) / 2
        examples = tuple(_example(run, kind, problem, midpoint) for kind, problem in _shown(run.report).items())
        return cls(RULE, str(direction.site), midpoint, abs(long - short) / 2, examples)


def _shown(report: Evaluation) -> dict[str, Problem]:
    """The first problem that the edit repairs, the first that it leaves right, and the first that it gets wrong."""
    before, after = (report.arms[arm].correct[:, 0] for arm in ("plain", "edited"))
    marks = any(problem.subgroup for problem in report.problems)
    firsts: dict[str, Problem] = {}
    for problem, was, now in zip(report.problems, before, after, strict=True):
        marked = bool(problem.subgroup)
        if now and not was and marked == marks:
            firsts.setdefault(KINDS[0], problem)
        elif was and now and not marked:
            firsts.setdefault(KINDS[1], problem)
        elif not now:
            firsts.setdefault(KINDS[2], problem)
    return {kind: firsts[kind] for kind in KINDS if kind in firsts}


def _example(run: ThinkEditRun, kind: str, problem: Problem, midpoint: float) -> ExampleRecord:
    plain, edited = (_side(run, problem, recipe, midpoint) for recipe in (None, run.recipe))
    return ExampleRecord(kind, problem.question, problem.answer, problem.subgroup, plain, edited)


@torch.no_grad()
def _side(run: ThinkEditRun, problem: Problem, recipe: Recipe | None, midpoint: float) -> SideRecord:
    """A completion, and each token's projection on the direction's unit, less the midpoint of the classes."""
    with nullcontext() if recipe is None else applied(run.model, recipe, must_fire=False):
        completion = solve(run.model, [problem], sampling=run.sampling, label="examples")[0]
        values = _projections(run.model, completion, run.direction)
    tokenizer, read = tokenizer_of(run.model), (0, 0)
    if completion.span is not None:
        span = POSITIONS[run.selected.position](completion)
        read = span.start, span.stop
    end = len(completion.prompt_ids) + SHOWN
    return SideRecord(
        correct=is_correct(completion, problem, run.task.grader),
        thinking_tokens=completion.thinking_tokens,
        truncated=completion.truncated,
        left_out=max(0, len(completion.ids) - SHOWN),
        prompt_tokens=len(completion.prompt_ids),
        read=read,
        tokens=tuple(decode(tokenizer, [token]) for token in completion.all_ids[:end]),
        projections=tuple(value - midpoint for value in values[:end]),
    )


def _projections(model: PreTrainedModel, completion: Completion, direction: Direction) -> list[float]:
    ids = torch.tensor([completion.all_ids], device=model.device)
    with captured(model, [direction.site]) as seen:
        forward_through(model, direction.site.layer, ids, torch.ones_like(ids))
    stream = seen[direction.site][0].float()
    return cast(list[float], (stream @ direction.unit.to(stream.device)).tolist())
