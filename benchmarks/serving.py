"""Steered requests in vLLM beside plain ones: tokens a second, as a ratio, in one engine, round by round.

SmolLM2-135M-Instruct, float32, one thread, prefix caching off, processor's clock. Arms take turns: plain; `add`, one
vector in the stream behind one block while thinking; `everywhere`, a vector ablated from the stream behind every block.
What the kernel moves is counted on paper, for a model of 8 billion parameters.

    GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python benchmarks/serving.py [ROUNDS]
"""

import json
import os
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console
from steering_overhead import prompts
from timing import in_words, ratio

from probes import Site, load
from probes.model import delimiters_of
from probes.tables import Table
from steer import Ablate, Add, Recipe
from steer.engines.vllm import serving_settings
from steer.engines.vllm.engine import write_for_vllm
from steer.engines.vllm.job import run_job

ROUNDS, BATCHES, NEW, TARGET = 25, (1, 4, 16), 32, 0.97
EIGHT_B = {"d_model": 4096, "n_layers": 36, "weights": 8.2e9 * 2, "batch": 256, "bytes a number": 2}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with TemporaryDirectory() as name:
        seconds, touched = timed(Path(name), rounds)
    facts, rows = {}, []
    for batch in BATCHES:
        plain = np.array(seconds[batch, None])
        for arm in ("add", "everywhere"):
            found = ratio(plain / np.array(seconds[batch, arm]))
            facts[f"{arm}, batch {batch}"] = {"ratio": found, "met": found[0] >= TARGET}
            rows.append((arm, batch, NEW * batch / float(np.median(plain)), in_words(found)))
    title = f"{NEW} new tokens, {rounds} rounds, target {TARGET}"
    console = Console(width=120)
    console.print(
        Table(("arm", "batch", "plain, tokens a second of it", "steered over plain [95 %]"), tuple(rows), title)
    )
    print(
        json.dumps(
            {"load_average": os.getloadavg(), "target": TARGET, **facts, "touched": touched, "on paper": on_paper()}
        )
    )


def timed(folder: Path, rounds: int) -> tuple[dict[tuple[int, str | None], list[float]], int]:
    """Seconds of the processor by batch and arm, round by round, and how many tokens were touched."""
    model = load("smollm2", dtype=torch.float32, delimiters=("<|im_start|>assistant\n", " answer"))
    vector = torch.randn(576, generator=torch.Generator().manual_seed(0))
    every = [Ablate(Site(layer, "resid_post"), vector) for layer in range(30)]
    recipes = {
        "add": Recipe.of(model, [Add(Site(15, "resid_post"), vector / vector.norm())], scope="thinking"),
        "everywhere": Recipe.of(model, every),
    }
    for name, recipe in recipes.items():
        recipe.save(folder / name)
    settings = serving_settings({name: folder / name for name in recipes}, delimiters_of(model))
    (ids,) = prompts(model, 1).tolist()

    def requests(batch: int, arm: str | None) -> list[dict[str, object]]:
        return [{"ids": ids, "n": NEW, "xargs": None if arm is None else {"thinksteer": arm}}] * batch

    rng, arms = random.Random(0), (None, *recipes)
    order = [(batch, arm) for batch in BATCHES for arm in arms]  # not counted
    order += [(batch, arm) for batch in BATCHES for _ in range(rounds) for arm in rng.sample(arms, len(arms))]
    engine = {
        "dtype": "float32", "max_model_len": 512, "enforce_eager": True, "max_num_seqs": max(BATCHES),
        "skip_tokenizer_init": True, "generation_config": "vllm", "enable_prefix_caching": False,
        "disable_log_stats": True, "additional_config": settings,
    }  # fmt: skip
    job = {
        "model": str(write_for_vllm(model, folder / "model")),
        "engine": engine,
        "plugin": True,
        "rounds": [requests(*own) for own in order],
    }
    told = run_job(job, folder)
    seconds: dict[tuple[int, str | None], list[float]] = {}
    for own, spent in list(zip(order, told["cpu_seconds"], strict=True))[len(BATCHES) * len(arms) :]:
        seconds.setdefault(own, []).append(spent)
    return seconds, sum(row["tokens"] for row in told["logs"][-1])


def on_paper() -> dict[str, float]:
    """Of a decode step: what the kernel reads and writes of the stream at each place, as shares of the weights read."""
    own = EIGHT_B
    stream = own["batch"] * own["d_model"] * own["bytes a number"] * 4  # hidden and residual, read and written
    lookups = own["batch"] * (8 + 4 + 4 + 8 + 8 + 16) + own["d_model"] * 4  # rows, multiples, numbers; one vector
    place = stream + lookups
    return {
        "bytes a place": place,
        "share of the weights, one place": place / own["weights"],
        "share of the weights, every block": own["n_layers"] * place / own["weights"],
    }


if __name__ == "__main__":
    main()
