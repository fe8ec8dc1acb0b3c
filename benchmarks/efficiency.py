"""Efficiency-Steering-style directions on organisms of three training seeds: shorter thinking at the same accuracy?

Eight samples of each of 400 probe problems give the pairs: a problem's shortest and its longest correct completion.
Position, layer and strength (fixed in advance, in units of the stream's mean norm) are chosen on 400 selection
problems: the shortest thinking among the settings that lose at most .01 accuracy there. The choice is reported on 1,000
others, beside random directions of the same norm (3 draws, pooled) and a budget that cuts all thinking at that mean
length. Differences are paired by problem.

    python benchmarks/efficiency.py ORGANISM...
"""

import json
import sys

import torch
from rich.console import Console

from probes import Sampling, load
from probes.tables import Table
from steer import evaluate, task_named
from steer.decoding import Budget
from steer.evaluation import interval_of_mean, solve
from steer.evaluation.nulls import random_recipe
from steer.methods.efficiency import correct_pairs, most_efficient, recipes

STRENGTHS = (0.1, 0.2, 0.4, 0.8)
N_PROBE, SAMPLES, N_SELECT, N_REPORT, DRAWS = 400, 8, 400, 1000, 3


def main() -> None:
    torch.set_num_threads(1)
    facts = {name: measured(name) for name in sys.argv[1:] or ["organism"]}
    print(json.dumps(facts))


def measured(name: str) -> dict:
    model, task = load(name), task_named("chains")
    sampling = Sampling.of(model, max_new_tokens=task.max_new_tokens)
    problems = task.sample(N_PROBE, "probe")
    pairs = correct_pairs(solve(model, problems, sampling=sampling, samples=SAMPLES, batch_size=256), problems, task)
    settings = recipes(model, pairs, strengths=STRENGTHS)
    named = {str(setting): recipe for setting, recipe in settings.items()}
    selection = evaluate(model, task, task.sample(N_SELECT, "select"), named, sampling=sampling, batch_size=256)
    try:
        selected = most_efficient(selection, list(settings))
    except ValueError as error:
        Console(width=140).print(f"{name}: {error}")
        return {"pairs": len(pairs), "selected": None, "why": str(error)}
    found = settings[selected]
    limit = round(selection.score(str(selected)).length) - 2  # a budget does not count the two delimiters
    nulls = [random_recipe(found, seed=i) for i in range(DRAWS)]
    arms = {"efficiency": found, f"budget of {limit}": Budget(limit), "random directions": nulls}
    report = evaluate(model, task, task.sample(N_REPORT, "report"), arms, sampling=sampling, batch_size=256)
    rows, facts = [], {}
    for arm, outcomes in report.arms.items():
        score = report.score(arm)
        low, high = interval_of_mean(outcomes.length.mean(1).astype(float))
        gain = f"{score.difference:+.3f} [{score.difference_interval[0]:+.3f}, {score.difference_interval[1]:+.3f}]"
        rows.append((arm, f"{score.n} × {score.samples}", f"{score.length:.1f} [{low:.1f}, {high:.1f}]",
                     f"{score.accuracy:.3f}", gain))  # fmt: skip
        facts[arm] = {"length": score.length, "interval": [low, high], "accuracy": score.accuracy, "gain": gain}
    columns = ("arm", "n", "thinking tokens [95 %]", "accuracy", "against plain [95 %]")
    Console(width=140).print(Table(columns, tuple(rows), f"{name}: {len(pairs)} pairs; chosen: {selected}"))
    return {"pairs": len(pairs), "selected": str(selected), **facts}


if __name__ == "__main__":
    main()
