"""RICE on organisms of three training seeds: does reinforcing two experts help, and does it do more than other pairs?

Experts are scored on 1,000 probe problems. Strengths are fixed in advance; the best by accuracy on 400 selection
problems is named, and every strength is reported on 1,000 others: the two highest scores, reinforced at every token (as
the paper is understood) or at the opening of the thinking alone; the weights normalised again; other pairs of about the
same load (5 draws, pooled), at either; the two lowest scores; and decoding controls. Differences are paired by problem.

    python benchmarks/experts.py ORGANISM...
"""

import json
import sys

import torch
from rich.console import Console

from probes import load
from probes.tables import Table
from steer import Recipe, Scope, evaluate, task_named
from steer.decoding import BudgetForcing, CloseBias
from steer.evaluation import interval_of_mean
from steer.methods.rice import STRENGTHS, RiceSetting, nulls, recipe, rice

TOP, DRAWS = 2, 5
N_PROBE, N_SELECT, N_REPORT, BATCH = 1000, 400, 1000, 256
CONTROLS = {
    "wait, once": BudgetForcing(1),
    "closing biased by -1": CloseBias(-1.0),
    "closing biased by -2": CloseBias(-2.0),
}


def main() -> None:
    torch.set_num_threads(1)
    facts = {name: measured(name) for name in sys.argv[1:] or ["organism"]}
    print(json.dumps(facts))


def measured(name: str) -> dict:
    run = rice(
        load(name), task_named("chains"), top=(TOP,), strengths=STRENGTHS, controls=CONTROLS, draws=1,
        n_probe=N_PROBE, n_select=N_SELECT, n_report=N_REPORT, batch_size=BATCH,
    )  # fmt: skip
    model, association = run.model, run.association
    opening, others = Scope("thinking", window=(0, 1)), dict[str, list[Recipe]]()
    for strength in STRENGTHS:
        setting = RiceSetting(TOP, strength)
        others |= nulls(model, association, setting, draws=DRAWS)
        others[f"{setting}, at the opening"] = [recipe(model, association.top(TOP), strength, scope=opening)]
        drawn = nulls(model, association, setting, scope=opening, draws=DRAWS)[f"random experts × {strength:g}"]
        others[f"random experts × {strength:g}, at the opening"] = drawn
    report = run.report.joined(
        evaluate(model, run.task, run.report.problems, others, sampling=run.sampling, batch_size=BATCH)
    )
    shown = [f"top {TOP} × {strength:g}" for strength in STRENGTHS]
    order = ["plain", *shown, *others, *CONTROLS]
    rows, facts = [], {}
    for arm in order:
        score, outcomes = report.score(arm), report.arms[arm]
        low, high = interval_of_mean(outcomes.length.mean(1).astype(float))
        gain = f"{score.difference:+.3f} [{score.difference_interval[0]:+.3f}, {score.difference_interval[1]:+.3f}]"
        gain = "" if arm == "plain" else gain
        length = f"{score.length:.1f} [{low:.1f}, {high:.1f}]"
        rows.append((arm, f"{score.n} × {score.samples}", length, f"{score.accuracy:.3f}", gain,
                     "" if arm == "plain" else f"{score.p_adjusted:.2g}", f"{score.truncation:.1%}",
                     f"{score.repeated:.1%}"))  # fmt: skip
        facts[arm] = {"length": score.length, "length_interval": [low, high], "accuracy": score.accuracy, "gain": gain,
                      "truncation": score.truncation, "repeated": score.repeated}  # fmt: skip
    columns = ("arm", "n", "thinking tokens [95 %]", "accuracy", "against plain [95 %]", "p (adjusted)", "truncated",
               "repeated 4-grams")  # fmt: skip
    console = Console(width=150)
    console.print(association.table(6))
    console.print(Table(columns, tuple(rows), f"{name}: {run.experts}, chosen on the selection split: {run.selected}"))
    lowest = association.bottom(TOP)
    return {"experts": run.experts, "lowest": lowest, "selected": run.selected.strength,
            "left_out": association.left_out,
            **facts}  # fmt: skip


if __name__ == "__main__":
    main()
