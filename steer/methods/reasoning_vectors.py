"""Reasoning Vectors *(2509.01363)*: what reinforcement learning changed in one model, added to another of its family.

v = θ_RL - θ_SFT, both from one base and one data set; target + α v. Subtracted, it is the ablation. Beside the
controls here, a table of results needs the prompt alone ("Think step by step.") and the RL donor itself as the ceiling.
"""

from collections.abc import Sequence
from pathlib import Path

from steer.deltas._add import Plan, add
from steer.deltas.delta import WeightDelta
from steer.deltas.nulls import random_like, shuffled_layers


def reasoning_vector(reinforced: str | Path, tuned: str | Path) -> WeightDelta:
    """θ_RL - θ_SFT. Raises ValueError where the two do not hold the same tensors."""
    return WeightDelta.between(reinforced, tuned)


def enhance(
    target: str | Path,
    vector: WeightDelta,
    output: str | Path,
    *,
    strength: float = 1.0,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Plan:
    """Write target + strength · vector (paper: strength 1, all tensors)."""
    return add(target, vector, output, strength=strength, only=only, skip=skip)


def subtract(target: str | Path, vector: WeightDelta, output: str | Path, *, strength: float = 1.0) -> Plan:
    """Write target - strength · vector: the ablation, which should take the reasoning away."""
    return add(target, vector, output, strength=-strength)


def controls(vector: WeightDelta, *, seed: int = 0) -> dict[str, WeightDelta]:
    """What is added instead of the vector: its opposite, noise of its size in each tensor, its layers shuffled.

    A shuffle leaves the embedding and the head in place, and the effect may be theirs: to test the layers, give
    `vector.selected(skip=["embed"])`.
    """
    return {
        "subtracted": -vector,
        "noise": random_like(vector, seed=seed),
        "shuffled layers": shuffled_layers(vector, seed=seed),
    }
