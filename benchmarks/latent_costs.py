"""What latents cost: training beside SAELens' own loop, memory of scoring, and decoding with three of 16,384 set.

`training`: the same activations, ten steps of 1,024 tokens a round, our loop (with its bar and its figures) and
`SAETrainer.fit`, in an order drawn anew. `memory`: the peak of a fresh process that scores 4,096 tokens, and of one
that scores 32,768, of SmolLM2 with 16,384 latents. `decoding`: SmolLM2, greedy, arms side by side token by token
(`steering_overhead.py`), jumprelu and topk. One thread; the processor's clock.

    GOMP_SPINCOUNT=0 python benchmarks/latent_costs.py [training] [memory] [decoding]
"""

import json
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from multiprocessing import get_context

import numpy as np
import torch
from extraction import peak_so_far
from rich.console import Console
from steering_overhead import NEW_TOKENS, prompts, side_by_side
from timing import in_words, ratio, timed

from probes import Site, Span, load
from probes.saes import SAETraining, SparseAutoencoder, reason_score, training
from probes.tables import Table
from steer import Recipe, SetLatents, applied

ROUNDS, STEPS, WIDTH, D_SAE = 10, 10, 576, 3_072
LATENTS, SITE, BATCH = 16_384, Site(15, "resid_post"), 1_024
TARGETS = {"training": 0.95, "growth_mb": 20.0, "decoding": 1.10}


def main() -> None:
    torch.set_num_threads(1)
    facts = {"load_average": os.getloadavg()}
    for part in sys.argv[1:] or PARTS:
        facts[part] = PARTS[part]()
    print(json.dumps(facts))


def throughput() -> dict:
    model = load("smollm2")
    x = torch.randn(32 * BATCH, WIDTH, generator=torch.Generator().manual_seed(0))
    how = SAETraining(d_sae=D_SAE, tokens=STEPS * BATCH, k=32, batch_size=BATCH, rounds=1)

    def stream(*_: object, **__: object):
        while True:
            yield x

    training.activations = stream

    def ours() -> None:
        training.train_sae(model, [Span((1, 2), 0, 2)], SITE, how)

    def theirs() -> None:
        from sae_lens.training.mixing_buffer import mixing_buffer

        trainer = training._trainer(model, SITE, how)
        trainer.data_provider = mixing_buffer(16 * BATCH, BATCH, stream(seed=0))
        trainer.cfg.n_batches_for_norm_estimate = 10
        trainer.fit()

    seconds = timed({"ours": ours, "theirs": theirs}, ROUNDS)["cpu"]
    told = ratio(seconds["theirs"] / seconds["ours"])
    print("training, throughput of ours over SAELens' loop", in_words(told))
    return {"ratio": told, "target_met": told[0] >= TARGETS["training"]}


def memory() -> dict:
    peaks = {}
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # so that what is freed goes back at once, as in `extraction.py`
    for tokens in (4_096, 32_768):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            peaks[tokens] = process.submit(peak, tokens).result()
    few, many = peaks.values()
    print("memory, peaks in MB", peaks)
    return {"mb": peaks, "growth_mb": many - few, "target_met": many - few < TARGETS["growth_mb"]}


def peak(tokens: int) -> float:
    torch.set_num_threads(1)
    model, rng = load("smollm2"), random.Random(0)
    sae = autoencoder("topk")
    spans = [Span(tuple(rng.randrange(3, 1_000) for _ in range(256)), 0, 256) for _ in range(tokens // 256)]
    reason_score(model, sae, spans, words={"one": [" the", "the"], "other": [" a", "a"]})
    return peak_so_far()


def decoding() -> dict:
    model = load("smollm2", delimiters=("<|im_start|>assistant\n", " answer"))
    ids = prompts(model, 1)
    recipes = {
        kind: Recipe.of(model, [SetLatents.of(autoencoder(kind), {3: 0.01, 700: 0.01, 9_000: 0.01})])
        for kind in ("jumprelu", "topk")
    }
    arms = {"plain": lambda _: nullcontext()}
    arms |= {kind: (lambda model, recipe=recipe: applied(model, recipe)) for kind, recipe in recipes.items()}
    copies = [deepcopy(model) for _ in arms]
    side_by_side(arms, copies, ids)
    turned = (copies[i % len(arms) :] + copies[: i % len(arms)] for i in range(2 * ROUNDS))
    runs = [side_by_side(arms, those, ids, seed)[0] for seed, those in enumerate(turned)]
    steps = {name: np.stack([run[name] for run in runs])[:, 1:].sum(1) for name in arms}
    told = {kind: ratio(steps[kind] / steps["plain"]) for kind in recipes}
    rows = tuple((kind, in_words(found)) for kind, found in told.items())
    Console().print(Table(("3 of 16,384 latents", "steps over plain"), rows, f"{NEW_TOKENS} tokens, batch 1"))
    return {"ratios": told, "target_met": {kind: found[0] <= TARGETS["decoding"] for kind, found in told.items()}}


def autoencoder(kind: str) -> SparseAutoencoder:
    return SparseAutoencoder.at_random(SITE, d_in=WIDTH, d_sae=LATENTS, k=32 if kind == "topk" else 0, activation=kind)


PARTS = {"training": throughput, "memory": memory, "decoding": decoding}

if __name__ == "__main__":
    main()
