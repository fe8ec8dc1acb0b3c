"""Reasoning Vectors *(2509.01363)*: what reinforcement learning changed in one model, added to another of its family.

v = θ_RL - θ_SFT, both from one base and one data set, is `WeightDelta.between(rl, sft)`; target + strength · v, all
tensors and strength 1 in the paper, is `steer.deltas.add(target, v, folder)`. With a strength below 0 it is the
ablation, which should take the reasoning away. Beside the nulls here, a table of results needs the prompt alone ("Think
step by step.") and the RL donor itself as the ceiling.
"""

from steer.deltas.delta import WeightDelta
from steer.deltas.nulls import random_like, shuffled_layers


def nulls(vector: WeightDelta, *, seed: int = 0) -> dict[str, WeightDelta]:
    """What is added instead of the vector: its opposite, noise of its size in each tensor, its layers shuffled.

    A shuffle leaves the embedding and the head in place, and the effect may be theirs: to test the layers, give
    `vector.selected(skip=["embed"])`.

    >>> from steer.deltas import open_delta
    >>> from steer.methods.reasoning_vectors import nulls
    >>> list(nulls(open_delta("organism-rl") - open_delta("organism-sft")))
    ['subtracted', 'noise', 'shuffled layers']
    """
    return {
        "subtracted": -vector,
        "noise": random_like(vector, seed=seed),
        "shuffled layers": shuffled_layers(vector, seed=seed),
    }
