"""Does the closed loop hold the organism's mean thinking length at a set-point?

At the opening of the thinking a linear probe predicts its length, and an Add along the length direction (read there
too) is as strong as the prediction is far from the set-point. One strength, gain and layer serve all set-points: those
with the smallest mean relative error on the selection split. A governor then corrects the set-point after each batch,
from the lengths alone; it settles on the selection split, and the report split sees it work on. Arms there: the plain
model, the controller alone, the controller under its governor, and the same along random directions of the same norm (5
draws pooled). Mean length with a 95 % bootstrap interval over problems.

    python benchmarks/closed_loop.py
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel

from probes import Direction, Sampling, difference_in_means, load
from probes.directions import LengthProbe, fit_length, random_direction
from probes.model import sites_in
from probes.tables import Table
from steer import Add, Controller, Recipe, Scope, applied, evaluate, task_named
from steer.evaluation import Outcomes, interval_of_mean, solve
from steer.methods.thinkedit import LengthSplit

SET_POINTS = (10, 13, 16)
STRENGTHS, GAINS, LAYERS = (1.0, 2.0, 4.0), (0.5, 1.0, 2.0), (2, 3)
N_PROBE, N_SELECT, N_REPORT, DRAWS, BATCH = 1000, 400, 1000, 5, 50


@dataclass
class Governor:
    """Integral control: `aim` is what a `Controller` should be told, so that the mean comes out at `set_point`.

    After each batch aim moves by rate * (set_point - mean thinking length of the batch), and stays between a quarter of
    the set-point and four times it. It sees lengths alone, no answers.
    """

    set_point: float
    rate: float = 0.5
    aim: float = 0.0

    def __post_init__(self) -> None:
        if not self.set_point > 0 or not 0 < self.rate <= 1:
            raise ValueError(
                f"A governor needs a set-point above 0 and a rate above 0 and at most 1, but got {self.set_point} and "
                f"{self.rate}."
            )
        self.aim = self.aim or self.set_point

    def saw(self, lengths: Sequence[int]) -> None:
        """The thinking tokens of a batch that is done."""
        if not lengths:
            raise ValueError("A governor learns from lengths, but the batch was empty.")
        moved = self.aim + self.rate * (self.set_point - sum(lengths) / len(lengths))
        self.aim = min(max(moved, self.set_point / 4), self.set_point * 4)


def loop(
    model: PreTrainedModel, direction: Direction, probe: LengthProbe, set_point: float, strength: float, gain: float
) -> Recipe:
    scope = Scope("thinking", window=(0, 1), controller=Controller.of(probe, set_point, gain=gain))
    return Recipe.of(model, [Add.of(direction, strength, units="raw")], scope=scope)


def main() -> None:
    torch.set_num_threads(1)
    model, task = load("organism"), task_named("chains")
    sampling = Sampling.of(model, max_new_tokens=task.max_new_tokens)
    probed = solve(model, task.sample(N_PROBE, "probe"), sampling=sampling, batch_size=256)
    short, long = LengthSplit.by_quantile(probed).spans("first")
    sites = sites_in(model, "resid_post")
    directions = list(difference_in_means(model, long, short, sites).values())
    probes = [fit_length(model, probed, site) for site in sites]

    def lengths(problems, arms):
        return evaluate(model, task, problems, arms, sampling=sampling, batch_size=256).arms

    settings = list(product(LAYERS, STRENGTHS, GAINS))
    arms = {
        (setting, set_point): loop(model, directions[setting[0]], probes[setting[0]], set_point, *setting[1:])
        for setting in settings
        for set_point in SET_POINTS
    }
    selected, report = task.sample(N_SELECT, "select"), task.sample(N_REPORT, "report")
    tried = lengths(selected, {str(key): recipe for key, recipe in arms.items()})
    errors = {
        setting: np.mean([abs(tried[str((setting, target))].length.mean() / target - 1) for target in SET_POINTS])
        for setting in settings
    }
    layer, strength, gain = selected = min(errors, key=lambda setting: errors[setting])

    def governed(direction: Direction, target: int) -> Outcomes:
        """The report split in batches, under a governor that settled on the selection split."""
        governor, parts = Governor(target), []
        for split in (selected, report):
            for start in range(0, len(split), BATCH):
                batch = split[start : start + BATCH]
                recipe = loop(model, direction, probes[layer], governor.aim, strength, gain)
                with applied(model, recipe, must_fire=False):
                    done = solve(model, batch, sampling=sampling, batch_size=BATCH)
                governor.saw([c.thinking_tokens for c in done])
                if split is report:
                    parts.append(Outcomes.of(done, batch, task))
        return Outcomes(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("correct", "length", "truncated"))
        )

    rows: list[tuple] = []
    facts = {"selected": selected, "error_on_selection": float(errors[selected]), "r2_of_the_probe": probes[layer].r2}
    plain = lengths(report, {})["plain"]
    for target in SET_POINTS:
        alone = loop(model, directions[layer], probes[layer], target, strength, gain)
        drawn = [governed(random_direction(directions[layer], seed=i), target) for i in range(DRAWS)]
        found = {
            "plain": plain,
            "controller": lengths(report, {"controller": alone})["controller"],
            "controller, governed": governed(directions[layer], target),
            "random directions, governed": Outcomes.pooled(drawn),
        }
        for name, outcome in found.items():
            per_problem = outcome.length.mean(1).astype(float)
            low, high = interval_of_mean(per_problem)
            mean, accuracy = float(per_problem.mean()), float(outcome.correct.mean())
            cells = (f"{mean:.1f} [{low:.1f}, {high:.1f}]", f"{mean / target - 1:+.1%}", f"{outcome.length.std():.1f}")
            rows.append((target, name, *cells, f"{accuracy:.3f}", f"{outcome.truncated.mean():.1%}"))
            facts[f"{target} {name}"] = {"length": mean, "interval": [low, high], "accuracy": accuracy}
    columns = ("set-point", "arm", "mean thinking tokens [95 %]", "off by", "spread", "accuracy", "truncated")
    where = f"layer {layer}, strength {strength} of the direction's length, gain {gain}"
    title = f"{where}; R² of the probe {probes[layer].r2:.2f}; n = {N_REPORT}"
    Console(width=140).print(Table(columns, tuple(rows), title))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
