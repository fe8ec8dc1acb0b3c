"""What head scoring costs beside the forward pass: z_h · (W_hᵀ v) on z's mean, against building every head's write.

Both start from one batch's `z` and the columns of `o_proj`, and end in ⟨mean write, v⟩ for each head. Ours is the
arithmetic of `probes.activations.heads.head_writes`, u_h = W_hᵀ v included, though it needs that once and not for each
batch. The other builds the writes [tokens, n_heads, d_model], as TransformerLens' hook_result does, and projects them
on v. Random numbers, float32, one thread. The target is judged by the processor's clock: on a busy machine the wall's
flatters the arm that is too short to be interrupted.

    GOMP_SPINCOUNT=0 python benchmarks/heads.py [ROUNDS]
"""

import json
import os
import sys

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from timing import in_words, ratio, timed
from torch import Tensor

from probes.tables import Table

ROUNDS, TOKENS = 24, 512
SHAPES = {"SmolLM2": (576, 9, 64), "8B": (4096, 32, 128)}  # d_model, n_heads, d_head
TARGET_RATIO, TARGET_DIFFERENCE = 20.0, 1e-5


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    facts = {name: measured(*shape, rounds) for name, shape in SHAPES.items()}
    rows = [
        (name, *f["median_ms"].values(), *map(in_words, f["times_faster"].values()), f["difference"])
        for name, f in facts.items()
    ]
    columns = (
        "shape",
        "ours, CPU ms",
        "built, CPU ms",
        "times faster, wall clock [95 %]",
        "processor's clock [95 %]",
        "difference",
    )
    Console(width=140).print(Table(columns, tuple(rows), f"{TOKENS} tokens of one layer, {rounds} rounds"))
    print(json.dumps({"load_average": os.getloadavg(), **facts}))


def measured(d_model: int, n_heads: int, d_head: int, rounds: int) -> dict:
    numbers = torch.Generator().manual_seed(0)
    z = torch.randn(TOKENS, n_heads * d_head, generator=numbers)
    matrices = torch.randn(d_model, n_heads, d_head, generator=numbers) / d_model**0.5
    vector = torch.nn.functional.normalize(torch.randn(d_model, generator=numbers), dim=0)
    weights = torch.full((TOKENS,), 1 / TOKENS)
    arms = {"ours": lambda: ours(z, weights, matrices, vector), "built": lambda: built(z, weights, matrices, vector)}
    reference = arms["built"]()
    difference = float((arms["ours"]() - reference).abs().max() / reference.abs().max())
    seconds = timed(arms, rounds)
    faster = {clock: ratio(found["built"] / found["ours"]) for clock, found in seconds.items()}
    return {
        "median_ms": {arm: 1000 * float(np.median(seconds["cpu"][arm])) for arm in arms},
        "times_faster": faster,
        "difference": difference,
        "target_met": faster["cpu"][0] >= TARGET_RATIO and difference <= TARGET_DIFFERENCE,
    }


def ours(
    z: Float[Tensor, "tokens width"],
    weights: Float[Tensor, " tokens"],
    matrices: Float[Tensor, "d_model n_heads d_head"],
    vector: Float[Tensor, " d_model"],
) -> Float[Tensor, " n_heads"]:
    mean = (weights @ z).double().unflatten(0, matrices.shape[1:])
    u = torch.einsum("dhk,d->hk", matrices.float(), vector.float())
    return (mean * u.double()).sum(-1)


def built(
    z: Float[Tensor, "tokens width"],
    weights: Float[Tensor, " tokens"],
    matrices: Float[Tensor, "d_model n_heads d_head"],
    vector: Float[Tensor, " d_model"],
) -> Float[Tensor, " n_heads"]:
    writes = torch.einsum("phk,dhk->phd", z.unflatten(1, matrices.shape[1:]), matrices)
    return weights @ (writes @ vector)


if __name__ == "__main__":
    main()
