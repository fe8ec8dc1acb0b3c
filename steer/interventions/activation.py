"""What to do to an activation. A linear intervention has an `affine` form, and that form can be folded."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from probes.directions.direction import Direction
from probes.model.sites import Site

Units = Literal["stream", "raw"]


@dataclass(frozen=True, eq=False)
class Affine:
    """x + (x down) up + shift: the identity, a change of low rank, and a shift. Computed in float32."""

    down: Float[Tensor, "width rank"]
    up: Float[Tensor, "rank width"]
    shift: Float[Tensor, " width"]

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        wide = widened(x)
        down, up, shift = (tensor.to(wide.dtype) for tensor in (self.down, self.up, self.shift))
        return (wide + (wide @ down) @ up + shift).to(x.dtype)

    def then(self, other: "Affine") -> "Affine":
        """This change and then the other, as one."""
        down = torch.cat([self.down, other.down + self.down @ (self.up @ other.down)], dim=1)
        shift = self.shift + (self.shift @ other.down) @ other.up + other.shift
        return Affine(down, torch.cat([self.up, other.up]), shift)


@runtime_checkable
class Intervention(Protocol):
    """A change to the activation at one site. `vector` is its tensor, if it has one; `strength` its size."""

    kind: ClassVar[str]

    @property
    def site(self) -> Site: ...
    @property
    def vector(self) -> Float[Tensor, " width"] | None: ...
    @property
    def strength(self) -> float: ...

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]: ...


@dataclass(frozen=True, eq=False)
class Add:
    """x + strength * vector: activation addition (Turner et al. 2023). Added in the model's dtype."""

    kind: ClassVar[str] = "add"
    site: Site
    vector: Float[Tensor, " width"]
    strength: float = 1.0

    def __post_init__(self) -> None:
        _check(self.kind, self.site, self.vector, self.strength)

    @classmethod
    def of(cls, direction: Direction, strength: float, *, units: Units = "stream") -> "Add":
        """Along a direction, at its site. In units `stream` a strength of 1 adds a vector as long as the stream's mean
        norm there; in `raw` ones, the direction as it is."""
        vector = direction.unit * direction.stream_norm if units == "stream" else direction.vector
        return cls(direction.site, vector, strength)

    def affine(self, width: int) -> Affine:
        rank_0 = self.vector.new_zeros(width, 0)
        return Affine(rank_0, rank_0.T, self.strength * self.vector)

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return torch.add(x, self.vector.to(x.dtype), alpha=self.strength)


@dataclass(frozen=True, eq=False)
class Ablate:
    """x + strength * (target - x.v̂) v̂, with v̂ along vector: directional ablation (Arditi et al. 2024).

    With strength 1 the projection on v̂ becomes `target`: 0 removes it, another value sets it.
    """

    kind: ClassVar[str] = "ablate"
    site: Site
    vector: Float[Tensor, " width"]
    strength: float = 1.0
    target: float = 0.0

    def __post_init__(self) -> None:
        _check(self.kind, self.site, self.vector, self.strength, target=self.target)

    def affine(self, width: int) -> Affine:
        unit = _unit(self.vector)
        assert len(unit) == width
        return Affine(-self.strength * unit[:, None], unit[None, :], self.strength * self.target * unit)

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.affine(x.shape[-1])(x)


@dataclass(frozen=True, eq=False)
class Scale:
    """strength * x: of a head's z or write, or of what a block adds. 0 knocks it out, 1 changes nothing."""

    kind: ClassVar[str] = "scale"
    vector: ClassVar[None] = None
    site: Site
    strength: float = 0.0

    def __post_init__(self) -> None:
        _check(self.kind, self.site, None, self.strength)

    def affine(self, width: int) -> Affine:
        identity = torch.eye(width)
        return Affine((self.strength - 1) * identity, identity, torch.zeros(width))

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return x * self.strength


@dataclass(frozen=True, eq=False)
class Clamp:
    """x + strength * (clamp(x.v̂, low, high) - x.v̂) v̂: the projection on v̂ is kept within bounds. Not linear."""

    kind: ClassVar[str] = "clamp"
    site: Site
    vector: Float[Tensor, " width"]
    strength: float = 1.0
    low: float = float("-inf")
    high: float = float("inf")

    def __post_init__(self) -> None:
        _check(self.kind, self.site, self.vector, self.strength)
        if not self.low <= self.high:
            raise ValueError(f"A clamp needs low <= high, but got low={self.low} and high={self.high}.")

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        wide = widened(x)
        unit = _unit(self.vector).to(wide.dtype)
        projection = wide @ unit
        change = self.strength * (projection.clamp(self.low, self.high) - projection)
        return (wide + change[..., None] * unit).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Rotate:
    """(x + strength * vector) * ‖x‖ / ‖x + strength * vector‖: turned towards vector, as long as before.

    An Add that keeps the norm, as `normalize` does in Representation Engineering (Zou et al. 2023). Not linear.
    """

    kind: ClassVar[str] = "rotate"
    site: Site
    vector: Float[Tensor, " width"]
    strength: float = 1.0

    def __post_init__(self) -> None:
        _check(self.kind, self.site, self.vector, self.strength)

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        wide = widened(x)
        new = wide + self.strength * self.vector.to(wide.dtype)
        length = new.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return (new * (wide.norm(dim=-1, keepdim=True) / length)).to(x.dtype)


KINDS: dict[str, type[Add] | type[Ablate] | type[Scale] | type[Clamp] | type[Rotate]] = {
    kind.kind: kind for kind in (Add, Ablate, Scale, Clamp, Rotate)
}


def widened(x: Tensor) -> Tensor:
    """At least float32: what is computed inside."""
    return x if x.dtype == torch.float64 else x.float()


def placed(intervention: Intervention, device: torch.device) -> Intervention:
    """The same intervention with its tensor on `device`, so that no step of a run has to move it."""
    if intervention.vector is None:
        return intervention
    return replace(intervention, vector=intervention.vector.to(device))  # type: ignore[type-var]


def _unit(vector: Tensor) -> Tensor:
    return vector.float() / vector.float().norm()


def _check(kind: str, site: Site, vector: Tensor | None, strength: float, **numbers: float) -> None:
    for name, value in {"strength": strength, **numbers}.items():
        if not math.isfinite(value):
            raise ValueError(f"The {kind} at {site} has {name} {value}. Give a finite number.")
    if vector is not None and not vector.isfinite().all():
        raise ValueError(
            f"The vector for {site} holds NaN or infinite entries. Derive it again: was a class empty, or did the "
            "model's dtype overflow?"
        )
