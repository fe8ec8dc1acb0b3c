"""The reasoning vector, and the dial of thinking length, on organisms of three training seeds, with their controls.

From each organism three models are trained (`steer.training.donors`), unless the folder named with --donors holds them:
`rl` and `sft` on chains, and `target` on chains with an operation that the donors never see, most of whose training
completions are too short to be right. v = RL - SFT is added to the target. Strengths are fixed in advance. 1,000 report
problems at temperature 0.7, of the donors' task and of the target's own; differences are paired by problem. Noise and
shuffled layers are added with strength 1, 3 draws pooled.

The dial turns the base organism along SFT - base, and along RL - base; its settings are fixed in advance.

    python benchmarks/reasoning_vectors.py [--donors FOLDER] ORGANISM...
"""

import argparse
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from probes import Sampling, load
from probes.tables import Table
from steer import evaluate, task_named
from steer.decoding import PromptStyle
from steer.deltas import WeightDelta, add, dialled, open_delta, random_like, shuffled_layers
from steer.evaluation import solve
from steer.methods.cot_valve import length_dial
from steer.training import DONORS, train_donor

STRENGTHS = (-1.0, 0.25, 0.5, 1.0)
SETTINGS = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
N, DRAWS = 1000, 3
TASKS = ("chains", "mirrors")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("organisms", nargs="*", default=["organism"])
    parser.add_argument("--donors", type=Path, default=Path("runs/donors"), help="where they are, or are made")
    options = parser.parse_args()
    console, facts = Console(width=150), []
    for seed, organism in enumerate(options.organisms):
        places = {kind: options.donors / Path(organism).name / kind for kind in DONORS}
        for kind, place in places.items():
            if not place.exists():
                train_donor(kind, place, start=organism, seed=seed)
        vector, donors = WeightDelta.between(places["rl"], places["sft"]), {k: str(places[k]) for k in ("rl", "sft")}
        found = {task: added(places["target"], vector, task, donors) for task in TASKS}
        found |= {f"the dial {kind} - base": dial(organism, places[kind]) for kind in ("sft", "rl")}
        if organism == "organism":
            found |= {f"{task}, as shipped": shipped(task) for task in TASKS}
        for name, (table, _) in found.items():
            console.print(Table(table.columns, table.rows, f"{organism}, {name}: {table.title}"))
        facts.append({name: numbers for name, (_, numbers) in found.items()})
    print(json.dumps(facts))


def shipped(task_name: str) -> tuple[Table, dict]:
    """The same of the deltas in the package, which are of low rank and half precision."""
    with tempfile.TemporaryDirectory() as folder:
        add("organism", open_delta("organism-target"), f"{folder}/target")
        vector = open_delta("organism-rl") - open_delta("organism-sft")
        return added(Path(folder) / "target", vector, task_name, {})


def added(place: Path, vector: WeightDelta, task_name: str, donors: dict[str, str]) -> tuple[Table, dict]:
    """The target with the vector and with its controls, on one task."""
    target, task = load(place), task_named(task_name)
    problems, sampling = task.sample(N, "report"), Sampling.of(target, max_new_tokens=task.max_new_tokens)
    attempt = partial(solve, target, sampling=sampling, batch_size=250)

    def with_(delta: WeightDelta, strength: float):
        with dialled(target, delta, strength):
            return attempt(problems)

    layers = vector.selected(skip=["embed"])
    unmarked = [replace(problem, question=problem.id) for problem in problems]
    arms = {
        **{f"target {strength:+g} v": with_(vector, strength) for strength in STRENGTHS},
        "target + v, embedding and head alone": with_(vector.selected(["embed"]), 1.0),
        "target + v, the rest alone": with_(layers, 1.0),
        "prompt alone: `quick` left out": attempt(unmarked),
        "prompt alone: the thinking begins with Hmm": PromptStyle(thought="Hmm"),
        **{f"{kind.upper()} donor": load(folder) for kind, folder in donors.items()},
    }
    drawn = {
        "target + noise of the same norm": [random_like(vector, seed=i) for i in range(DRAWS)],
        "target + v, layers shuffled": [shuffled_layers(vector, seed=i) for i in range(DRAWS)],
        "target + v, the rest alone, layers shuffled": [shuffled_layers(layers, seed=i) for i in range(DRAWS)],
    }
    nulls = {name: [with_(delta, 1.0) for delta in deltas] for name, deltas in drawn.items()}
    result = evaluate(target, task, problems, {**arms, **nulls}, sampling=sampling, batch_size=250)
    rows = []
    for arm in result.arms:
        s = result.score(arm)
        low, high = s.difference_interval
        gain = "" if arm == "plain" else f"{s.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        name = "target" if arm == "plain" else arm
        rows.append((name, f"{s.n} × {s.samples}", f"{s.accuracy:.3f}", gain, f"{s.length:.1f}", f"{s.truncation:.1%}"))
    columns = ("arm", "n", "accuracy", "against the target [95 %]", "thinking tokens", "truncated")
    return Table(columns, tuple(rows), "v = RL - SFT; the RL donor is the ceiling"), result.to_dict()


def dial(organism: str, donor: Path) -> tuple[Table, dict]:
    """The organism at each setting of the dial donor - organism."""
    model, task = load(organism), task_named("chains")
    sampling = Sampling.of(model, max_new_tokens=task.max_new_tokens)
    delta, problems = WeightDelta.between(donor, organism), task.sample(N, "report")
    found = length_dial(model, delta, task, problems, sampling=sampling, strengths=SETTINGS, batch_size=250)
    change, interval = found.change
    facts = {"polarity": found.polarity, "monotone": found.monotone, "change": change, "interval": interval}
    return found.table(), facts


if __name__ == "__main__":
    main()
