"""Methods measured on the embedded reasoner, a command each: stories it was trained on, with a cue to be brief.

    python benchmarks/reasoner.py METHOD [--n 1024] [--device cuda] [--model reasoner --task stories]

`plain`: the model as it is, with its reasoning vector, and on the domain it never saw. `thinkedit`: as published, and
the best of four settings on a split of its own, beside random and lowest heads and random directions. `length`: the
length direction read at the opening of the thinking in the middle layer, and added there, over seven strengths fixed in
advance. Null draws are pooled; accuracy differences are paired by problem.
"""

import argparse
import json
import time
from itertools import product

import numpy as np
import torch
from rich.console import Console

from probes import Direction, Sampling, Site, load
from probes.model import n_layers
from probes.tables import Table
from steer import Add, Recipe, Scope, evaluate, task_named, thinkedit
from steer.deltas import open_delta
from steer.evaluation import Evaluation, LabelledDirection, interval_of_mean, solve, sweep
from steer.methods.thinkedit import LengthSplit, ThinkEditSetting

STRENGTHS = (-0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4)
DRAWS, N_JUDGE = 2, 50
LIMIT = 260  # new tokens; the longest chains that it was taught are shorter


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("method", choices=("plain", "thinkedit", "length"))
    words.add_argument("--n", type=int, default=1024)
    words.add_argument("--batch-size", type=int, default=1024)
    words.add_argument("--device", default="cpu")
    words.add_argument("--model", default="reasoner")
    words.add_argument("--task", default="stories")
    options = words.parse_args()
    began = time.monotonic()
    facts = {"plain": plain, "thinkedit": edited, "length": lengthened}[options.method](options)
    print(json.dumps({"method": options.method, "n": options.n, "seconds": time.monotonic() - began, **facts}))


def plain(options: argparse.Namespace) -> dict:
    """The model, and its twin with the reasoning vector added to the weights, on both kinds of stories."""
    facts = {}
    for name, task_name in (
        ("reasoner", "stories"),
        ("reasoner", "stories-minutes"),
        ("reasoner-target", "stories-minutes"),
    ):
        model, task = load(name).to(options.device), task_named(task_name)
        sampling = Sampling.of(model, max_new_tokens=LIMIT)
        problems = task.sample(options.n, "report")
        before = solve(model, problems, sampling=sampling, batch_size=options.batch_size, label=name)
        add_to(model, open_delta("reasoner-rl"))
        after = solve(model, problems, sampling=sampling, batch_size=options.batch_size, label=f"{name} + rl")
        found = evaluate(
            model, task, problems, {"with the reasoning vector": after}, baseline=before, sampling=sampling
        )
        spans = {"plain": all(c.span for c in before), "with the reasoning vector": all(c.span for c in after)}
        facts[f"{name}, {task_name}"] = told(f"{name}, {task_name}", found) | {"every row thinks": spans}
    return facts


@torch.no_grad()
def add_to(model: torch.nn.Module, delta: object) -> None:
    for name in delta.names:
        weight = model.get_parameter(name)
        weight += delta.tensor(name).to(weight)


def edited(options: argparse.Namespace) -> dict:
    model = load(options.model).to(options.device)
    settings = [
        ThinkEditSetting(*how, heads=0.06) for how in product(("project", "replace"), ("thinking", "first"), ("raw",))
    ]
    run = thinkedit(
        model, options.task, settings=settings, n_probe=options.n, n_select=options.n // 2, n_report=options.n,
        control_draws=DRAWS, sampling=Sampling.of(model, max_new_tokens=LIMIT), batch_size=options.batch_size,
    )  # fmt: skip
    Console(width=160).print(str(run.selected), run.heads, run.selection.table())
    facts = told(f"{options.model}: {run.selected}", run.report)
    return facts | {"selected": str(run.selected), "heads": run.heads, "auroc": run.auroc,
                    "selection": {arm: run.selection.score(arm).accuracy for arm in run.selection.arms},
                    "published": [f"L{a}H{b}" for a, b in run.readings["thinking"].heads(settings[0])]}  # fmt: skip


def lengthened(options: argparse.Namespace) -> dict:
    model, task = load(options.model).to(options.device), task_named(options.task)
    sampling = Sampling.of(model, max_new_tokens=LIMIT)
    probed = solve(model, task.sample(options.n, "probe"), sampling=sampling, batch_size=options.batch_size)
    short, long = LengthSplit.by_quantile(probed).spans("first")
    contrast = LabelledDirection.of(model, long, short, Site(n_layers(model) // 2, "resid_post"))

    def at_the_opening(direction: Direction, strength: float) -> Recipe:
        return Recipe.of(model, [Add.of(direction, strength)], scope=Scope("thinking", window=(0, 1)))

    found = sweep(
        model, task, contrast, at_the_opening, STRENGTHS, select=task.sample(options.n // 2, "select"),
        report=task.sample(options.n, "report"), judge=[*short[:N_JUDGE], *long[:N_JUDGE]], sampling=sampling,
        draws=DRAWS, batch_size=options.batch_size,
    )  # fmt: skip
    facts = told(f"{options.model}: {contrast.direction}; chosen {found.selected:+g}", found.report)
    return facts | {"selected": found.selected, "kl": found.kl}


def told(title: str, report: Evaluation) -> dict:
    """The arms of a report, in a table and as numbers: overall, and where the problem is marked."""
    rows, facts = [], {}
    for arm, outcomes in report.arms.items():
        for group in report.groups():
            score = report.score(arm, group)
            in_group = np.array([group in (None, problem.subgroup) for problem in report.problems])
            low, high = interval_of_mean(outcomes.length[in_group].mean(1).astype(float))
            difference = [score.difference, *score.difference_interval]
            gain = "" if arm == report.baseline else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference)
            rows.append((arm, group or "all", f"{score.n} × {score.samples}", f"{score.accuracy:.3f}", gain,
                         f"{score.length:.1f} [{low:.1f}, {high:.1f}]", f"{score.truncation:.1%}"))  # fmt: skip
            facts.setdefault(arm, {})[group or "all"] = {
                "n": score.n, "samples": score.samples, "accuracy": score.accuracy, "against plain": difference,
                "length": [score.length, low, high], "truncated": score.truncation, "p": score.p_adjusted,
            }  # fmt: skip
    columns = ("arm", "problems", "n", "accuracy", "against plain [95 %]", "thinking tokens [95 %]", "truncated")
    Console(width=160).print(Table(columns, tuple(rows), title))
    return {"arms": facts}


if __name__ == "__main__":
    main()
