"""What a weight delta is compared with: noise of the same size, and the same tensors in other layers."""

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.tables import Brief
from steer.checkpoints.checkpoint import blocks
from steer.deltas._norms import LAYER
from steer.deltas.delta import WeightDelta


@dataclass(frozen=True, eq=False, repr=False)
class NullDelta(Brief):
    """A source with the names and shapes of a delta, and numbers of its own: `kind` and `seed` say which.

    >>> from steer.deltas import open_delta, random_like
    >>> null = random_like(open_delta("organism-rl"), seed=3).terms[0].source
    >>> null.kind, null.seed
    ('noise', 3)
    """

    delta: WeightDelta
    seed: int
    kind: str
    lengths: dict[str, float] = field(default_factory=dict)
    names_from: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> Sequence[str]:
        return self.delta.names

    @property
    def vocabulary(self) -> str | None:
        return self.delta.vocabulary

    @property
    def tied(self) -> bool | None:
        return self.delta.tied

    @property
    def config(self) -> Mapping[str, Any]:
        return self.delta.config

    @property
    def words(self) -> dict[str, Any]:
        return {"control": self.kind, "seed": self.seed, "of": self.delta.made_of}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.delta.shape(name)

    def block(self, name: str, rows: slice) -> Float[Tensor, "rows width"]:
        if self.kind == "shuffled layers":
            return self.delta.block(self.names_from[name], rows)
        return self._noise(name, rows) * self._scale(name)

    def _noise(self, name: str, rows: slice) -> Float[Tensor, "rows width"]:
        """Of its own for each block, so that a block can be asked for alone."""
        seed = zlib.crc32(f"{self.seed}/{name}/{rows.start}".encode())
        shape = self.shape(name)
        width = shape[-1] if len(shape) > 1 else 1
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows.stop - rows.start, width, dtype=torch.float64, generator=generator)

    def _scale(self, name: str) -> float:
        if name not in self.lengths:
            wanted = made = 0.0
            for rows in blocks(self.shape(name)):
                wanted += float(self.delta.block(name, rows).square().sum())
                made += float(self._noise(name, rows).square().sum())
            self.lengths[name] = (wanted / made) ** 0.5
        return self.lengths[name]


def random_like(delta: WeightDelta, *, seed: int = 0) -> WeightDelta:
    """Gaussian noise with the norm of the delta in every tensor. It reads the delta once, as it is asked for.

    >>> from steer.deltas import open_delta, random_like
    >>> delta = open_delta("organism-rl")
    >>> null, name = random_like(delta), "model.layers.1.self_attn.q_proj.weight"
    >>> [round(float(d.tensor(name).norm()), 3) for d in (delta, null)]
    [0.418, 0.418]
    """
    return WeightDelta.of(NullDelta(delta, seed, "noise"))


def shuffled_layers(delta: WeightDelta, *, seed: int = 0) -> WeightDelta:
    """The delta's own tensors, each in another layer than its own, among layers of the same tensors and shapes.

    What belongs to no layer stays. Raises ValueError where no layer has a peer.

    >>> from steer.deltas import open_delta, shuffled_layers
    >>> delta = open_delta("organism-rl")
    >>> null = shuffled_layers(delta).tensor("model.layers.1.self_attn.q_proj.weight")
    >>> [i for i in range(4) if delta.tensor(f"model.layers.{i}.self_attn.q_proj.weight").equal(null)]
    [3]
    """
    layers: dict[str, dict[str, str]] = {}
    for name in delta.names:
        if match := LAYER.search(name):
            layers.setdefault(match[1], {})[f"{name[: match.start(1)]}*{name[match.end(1) :]}"] = name
    alike: dict[frozenset[Any], list[str]] = {}
    for layer, tensors in layers.items():
        alike.setdefault(frozenset((kind, delta.shape(name)) for kind, name in tensors.items()), []).append(layer)
    names_from = {name: name for name in delta.names}
    rng = random.Random(seed)
    for group in alike.values():
        rng.shuffle(group)
        for here, there in zip(group, [*group[1:], group[0]], strict=True):  # a cycle: none keeps its own
            names_from |= {name: layers[there][kind] for kind, name in layers[here].items()}
    if all(name == other for name, other in names_from.items()):
        raise ValueError("No layer of the delta has the same tensors as another: there is nothing to shuffle.")
    return WeightDelta.of(NullDelta(delta, seed, "shuffled layers", names_from=names_from))
