"""A verbosity direction on a real model: does more of it make SmolLM2-135M-Instruct's answers longer?

The direction contrasts two instructions of our own, "Answer at length" and "Answer briefly", after the same 30
questions, at the last token of the prompt, in the middle layer. It is added at every token the model writes, at five
strengths fixed in advance (units: the stream's mean norm there). Mean answer length over 100 others; Spearman's
correlation of strength with it, and the tokens gained from the lowest strength to the highest, each with a 95 %
bootstrap interval over questions; the same along two random directions of the same norm. Any direction moves the
length in some order, so that the size of the effect tells more than the correlation. An answer that only repeats itself
is long, too: the share of 4-grams that came before stands beside each length. Nothing is selected.

    python benchmarks/verbosity.py
"""

import json
from contextlib import nullcontext

import numpy as np
import torch
from rich.console import Console
from scipy.stats import spearmanr

from probes import Completion, Direction, Sampling, Site, Span, difference_in_means, generate, load
from probes.directions import random_direction
from probes.model import encode_prompt, n_layers, tokenizer_of
from probes.tables import Table
from steer import Add, Recipe, applied
from steer.evaluation import repetition

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
N_READ, N_ASKED, N_RANDOM, NEW_TOKENS, BATCH = 30, 100, 2, 128, 50


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

    def answers(direction: Direction, strength: float) -> list[Completion]:
        recipe = Recipe.of(model, [Add.of(direction, strength)], scope="thinking")
        with applied(model, recipe) if strength else nullcontext():
            return generate(model, asked, sampling=sampling, batch_size=BATCH, label=f"{strength:+g}")

    plain, rows, facts = answers(verbose, 0.0), [], {}
    randoms = {f"random direction {seed}": random_direction(verbose, seed=seed) for seed in range(N_RANDOM)}
    for name, direction in {"verbosity": verbose, **randoms}.items():
        found = [answers(direction, strength) if strength else plain for strength in STRENGTHS]
        table = np.array([[len(c.ids) for c in done] for done in found], dtype=float)  # [strengths, questions]
        rng = np.random.default_rng(0)
        drawn = [table[:, rng.integers(0, N_ASKED, N_ASKED)].mean(1) for _ in range(2_000)]
        rho, gain = (
            _with_interval([spearmanr(STRENGTHS, means).statistic for means in (table.mean(1), *drawn)]),
            (_with_interval([means[-1] - means[0] for means in (table.mean(1), *drawn)])),
        )
        repeated = [float(np.mean([repetition(c.ids) for c in done])) for done in found]
        truncated = [float(np.mean([c.truncated for c in done])) for done in found]
        cells = [f"{x:.0f} ({t:.0%}, {r:.0%})" for x, t, r in zip(table.mean(1), truncated, repeated, strict=True)]
        rows.append(
            (name, *cells, "{:+.2f} [{:+.2f}, {:+.2f}]".format(*rho), "{:+.0f} [{:+.0f}, {:+.0f}]".format(*gain))
        )
        facts[name] = {"lengths": table.mean(1).tolist(), "truncated": truncated, "repeated": repeated,
                       "spearman": rho, "gain": gain}  # fmt: skip
    columns = ("direction", *(f"{strength:+g}" for strength in STRENGTHS), "Spearman [95 %]", "gain [95 %]")
    title = f"Answer tokens (truncated at {NEW_TOKENS}, repeated 4-grams); {verbose}, n = {N_ASKED}"
    Console(width=140).print(Table(columns, tuple(rows), title))
    print(json.dumps(facts))


def _with_interval(values: list[float]) -> list[float]:
    """The first value, and the middle 95 % of the others."""
    return [float(values[0]), *np.percentile(values[1:], [2.5, 97.5]).tolist()]


if __name__ == "__main__":
    main()
