"""Completions of the plain and of the edited model side by side, with each token's projection on the direction."""

from contextlib import nullcontext
from typing import Any

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


def side_by_side(run: ThinkEditRun) -> dict[str, Any]:
    """One problem of each kind, solved again by the plain and by the edited model: the noise is the problem's own."""
    direction, split = run.direction, run.readings[run.selected.position].split
    short, long = split.spans(run.selected.position)
    means = [float(project(run.model, spans, [direction]).mean()) for spans in (short, long)]
    midpoint = sum(means) / 2
    examples = []
    for kind, problem in _examples(run.report).items():
        sides = {
            "plain": _side(run, problem, None, direction, midpoint),
            "edited": _side(run, problem, run.recipe, direction, midpoint),
        }
        about = {"kind": kind, "problem": problem.question, "answer": problem.answer, "subgroup": problem.subgroup}
        examples.append({**about, **sides})
    return {
        "rule": RULE,
        "site": str(direction.site),
        "midpoint": midpoint,
        "scale": abs(means[1] - means[0]) / 2,
        "examples": examples,
    }


def _examples(report: Evaluation) -> dict[str, Problem]:
    """The first problem that the edit repairs, the first that it leaves right, and the first that it gets wrong."""
    before, after = (report.arms[arm].correct[:, 0] for arm in ("plain", "edited"))
    marks = any(problem.subgroup for problem in report.problems)
    found: dict[str, Problem] = {}
    for problem, was, now in zip(report.problems, before, after, strict=True):
        marked = bool(problem.subgroup)
        if now and not was and marked == marks:
            found.setdefault(KINDS[0], problem)
        elif was and now and not marked:
            found.setdefault(KINDS[1], problem)
        elif not now:
            found.setdefault(KINDS[2], problem)
    return {kind: found[kind] for kind in KINDS if kind in found}


@torch.no_grad()
def _side(
    run: ThinkEditRun,
    problem: Problem,
    recipe: Recipe | None,
    direction: Direction,
    midpoint: float,
) -> dict[str, Any]:
    """A completion, and each token's projection on the direction's unit, less the midpoint of the classes."""
    with nullcontext() if recipe is None else applied(run.model, recipe, must_fire=False):
        done = solve(run.model, [problem], sampling=run.sampling, label="examples")[0]
        values = _projections(run.model, done, direction)
    read = POSITIONS[run.selected.position](done)
    tokenizer = tokenizer_of(run.model)
    kept = len(done.prompt_ids) + SHOWN
    return {
        "correct": is_correct(done, problem, run.task.grader),
        "thinking_tokens": done.thinking_tokens,
        "truncated": done.truncated,
        "left_out": max(0, len(done.ids) - SHOWN),
        "prompt_tokens": len(done.prompt_ids),
        "read": [read.start, read.stop],
        "tokens": [decode(tokenizer, [token]) for token in done.all_ids[:kept]],
        "projections": [value - midpoint for value in values[:kept]],
    }


def _projections(model: PreTrainedModel, completion: Completion, direction: Direction) -> list[float]:
    ids = torch.tensor([completion.all_ids], device=model.device)
    with captured(model, [direction.site]) as seen:
        forward_through(model, direction.site.layer, ids, torch.ones_like(ids))
    stream = seen[direction.site][0].float()
    return (stream @ direction.unit.to(stream.device)).tolist()
