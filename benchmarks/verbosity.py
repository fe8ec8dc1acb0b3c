"""A verbosity direction on a real model: does more of it make SmolLM2-135M-Instruct's answers longer?

The direction contrasts two instructions of our own, "Answer at length" and "Answer briefly", after the same 30
questions, at the last token of the prompt, in the middle layer. It is added at every token the model writes, at five
strengths fixed in advance (units: the stream's mean norm there). Mean answer length over 100 others; Spearman's
correlation of strength with it, with a 95 % bootstrap interval over questions; the same along a random direction of
the same norm. Nothing is selected.

    python benchmarks/verbosity.py
"""

import json

import numpy as np
import torch
from rich.console import Console
from scipy.stats import spearmanr

from probes import Direction, Sampling, difference_in_means, generate, load
from probes.activations import Span
from probes.architectures import n_layers
from probes.directions import random_direction
from probes.models import tokenizer_of
from probes.sites import Site
from probes.tables import Table
from probes.tokens import encode_prompt
from steer import Add, Recipe, applied

STRENGTHS = (-0.2, -0.1, 0.0, 0.1, 0.2)
BRIEF, LONG = "Answer briefly, in a few words.", "Answer at length, in great detail and with examples."
THINGS = """
river bridge door clock apple horse ship garden letter mirror candle winter market teacher island engine
song carpet forest hammer library mountain newspaper ocean pencil queen railway shadow telephone umbrella
village window yard zebra anchor bakery camera desert elephant factory guitar hotel iceberg jacket kitchen
ladder magnet needle orchard piano quilt rocket saddle temple uncle volcano wagon xylophone yacht zipper
acorn balloon castle dragon eagle feather glacier harbour insect jungle kettle lantern meadow nest oven
parrot quarry rainbow spider tunnel universe violin whale wheel yoghurt zoo atlas basket cactus diamond
earthquake fountain goat helmet ivy jewel knot lemon moon notebook olive planet rabbit satellite tiger urn
valley waterfall robot museum honey comet bicycle compass dolphin embassy falcon grape hill igloo jury kite
lizard mosque nurse onion pilot quartz road stone train
""".split()  # noqa: SIM905
N_READ, N_ASKED, NEW_TOKENS, BATCH = 30, 100, 128, 50


def main() -> None:
    torch.set_num_threads(1)
    model = load("smollm2", delimiters=("<|im_start|>assistant\n", "<|im_end|>"))  # all it writes
    questions = [f"What is a {thing}?" for thing in THINGS]
    site = Site(n_layers(model) // 2, "resid_post")

    def last(instruction: str) -> list[Span]:
        rows = [tuple(encode_prompt(tokenizer_of(model), f"{q} {instruction}")) for q in questions[:N_READ]]
        return [Span(ids, len(ids) - 1, len(ids)) for ids in rows]

    verbose = difference_in_means(model, last(LONG), last(BRIEF), [site])[site]
    asked = questions[N_READ : N_READ + N_ASKED]
    sampling = Sampling.of(model, max_new_tokens=NEW_TOKENS, seed=0)

    def lengths(direction: Direction, strength: float) -> tuple[np.ndarray, float]:
        recipe = Recipe.of(model, [Add.of(direction, strength)], scope="thinking")
        with applied(model, recipe):
            done = generate(model, asked, sampling=sampling, batch_size=BATCH, label=f"{strength:+g}")
        return np.array([len(c.ids) for c in done], dtype=float), float(np.mean([c.truncated for c in done]))

    rows, facts = [], {}
    arms = {"verbosity": verbose, "random direction": random_direction(verbose, seed=0)}
    for name, direction in arms.items():
        found = [lengths(direction, strength) for strength in STRENGTHS]
        table = np.stack([length for length, _ in found])  # [strengths, questions]
        rng = np.random.default_rng(0)
        resampled = [table[:, rng.integers(0, N_ASKED, N_ASKED)].mean(1) for _ in range(2_000)]
        rhos = [spearmanr(STRENGTHS, means).statistic for means in resampled]
        rho, interval = spearmanr(STRENGTHS, table.mean(1)).statistic, np.percentile(rhos, [2.5, 97.5])
        means = [f"{length.mean():.1f} ({truncated:.0%})" for length, truncated in found]
        rows.append((name, *means, f"{rho:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"))
        facts[name] = {"lengths": table.mean(1).tolist(), "spearman": rho, "interval": interval.tolist()}
    columns = ("direction", *(f"{strength:+g}" for strength in STRENGTHS), "Spearman [95 %]")
    title = f"Mean answer tokens (truncated at {NEW_TOKENS}); {verbose}, n = {N_ASKED}"
    Console(width=140).print(Table(columns, tuple(rows), title))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
