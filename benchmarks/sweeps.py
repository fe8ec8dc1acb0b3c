"""Thinking length against strength, on organisms of three training seeds, with every control.

The length direction, read at the opening of the thinking in the middle layer and added there, at that one position.
Strengths are fixed in advance, in units of the direction's own length. The best by accuracy on 400 selection problems
is then reported on 1,000 others, beside random directions of the same norm, directions of shuffled labels, and random
directions of the same KL (3 draws each, pooled). Accuracy differences are paired by problem.

    python benchmarks/sweeps.py ORGANISM...
"""

import json
import sys

import torch
from rich.console import Console

from probes import Direction, Sampling, Site, load
from probes.model import n_layers
from probes.tables import Table
from steer import Add, Recipe, Scope, task_named
from steer.evaluation import LabelledDirection, interval_of_mean, solve, sweep
from steer.methods.thinkedit import LengthSplit

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
N_PROBE, N_SELECT, N_REPORT, N_JUDGE = 1000, 400, 1000, 50


def main() -> None:
    torch.set_num_threads(1)
    facts = {name: measured(name) for name in sys.argv[1:] or ["organism"]}
    print(json.dumps(facts))


def measured(name: str) -> dict:
    model, task = load(name), task_named("chains")
    sampling = Sampling.of(model, max_new_tokens=task.max_new_tokens)
    probed = solve(model, task.sample(N_PROBE, "probe"), sampling=sampling, batch_size=256)
    short, long = LengthSplit.by_quantile(probed).spans("first")
    site = Site(n_layers(model) // 2, "resid_post")
    contrast = LabelledDirection.of(model, long, short, site)

    def at_the_opening(direction: Direction, strength: float) -> Recipe:
        return Recipe.of(model, [Add.of(direction, strength, units="raw")], scope=Scope("thinking", window=(0, 1)))

    found = sweep(
        model,
        task,
        contrast,
        at_the_opening,
        STRENGTHS,
        select=task.sample(N_SELECT, "select"),
        report=task.sample(N_REPORT, "report"),
        judge=[*short[:N_JUDGE], *long[:N_JUDGE]],
        sampling=sampling,
        batch_size=256,
    )
    rows, facts = [], {}
    for arm, outcomes in found.report.arms.items():
        score = found.report.score(arm)
        low, high = interval_of_mean(outcomes.length.mean(1).astype(float))
        gain = f"{score.difference:+.3f} [{score.difference_interval[0]:+.3f}, {score.difference_interval[1]:+.3f}]"
        length = f"{score.length:.1f} [{low:.1f}, {high:.1f}]"
        rows.append((arm, f"{score.n} × {score.samples}", length, f"{score.accuracy:.3f}", gain))
        facts[arm] = {"length": score.length, "interval": [low, high], "accuracy": score.accuracy, "gain": gain}
    columns = ("arm", "n", "thinking tokens [95 %]", "accuracy", "against plain [95 %]")
    direction = contrast.direction
    title = f"{name}: {direction}; chosen {found.selected:+g}, {found.kl:.3f} nats at the opening"
    Console(width=140).print(Table(columns, tuple(rows), title))
    return {"selected": found.selected, "kl": found.kl, **facts}


if __name__ == "__main__":
    main()
