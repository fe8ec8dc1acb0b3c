"""What to do to an activation. A linear intervention has an `affine` form, and that form can be folded."""

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from probes.sites import Site


@dataclass(frozen=True, eq=False)
class Affine:
    """x + (x down) up + shift: the identity, a change of low rank, and a shift. Computed in float32."""

    down: Float[Tensor, "width rank"]
    up: Float[Tensor, "rank width"]
    shift: Float[Tensor, " width"]

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        wide = x.float()
        return (wide + (wide @ self.down) @ self.up + self.shift).to(x.dtype)

    def then(self, other: "Affine") -> "Affine":
        """This change and then the other, as one."""
        down = torch.cat([self.down, other.down + self.down @ (self.up @ other.down)], dim=1)
        shift = self.shift + (self.shift @ other.down) @ other.up + other.shift
        return Affine(down, torch.cat([self.up, other.up]), shift)


@runtime_checkable
class Intervention(Protocol):
    """A change to the activation at one site. `vector` is its tensor; `strength` its size."""

    kind: ClassVar[str]

    @property
    def site(self) -> Site: ...
    @property
    def vector(self) -> Float[Tensor, " width"]: ...
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

    @property
    def affine(self) -> Affine:
        rank_0 = self.vector.new_zeros(len(self.vector), 0)
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

    @property
    def affine(self) -> Affine:
        unit = self.vector.float() / self.vector.float().norm()
        return Affine(-self.strength * unit[:, None], unit[None, :], self.strength * self.target * unit)

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.affine(x)


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
        if not self.low <= self.high:
            raise ValueError(f"A clamp needs low <= high, but got low={self.low} and high={self.high}.")

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        wide, unit = x.float(), self.vector.float() / self.vector.float().norm()
        projection = wide @ unit
        change = self.strength * (projection.clamp(self.low, self.high) - projection)
        return (wide + change[..., None] * unit).to(x.dtype)


KINDS: dict[str, type[Add] | type[Ablate] | type[Clamp]] = {kind.kind: kind for kind in (Add, Ablate, Clamp)}


def placed(intervention: Intervention, device: torch.device) -> Intervention:
    """The same intervention with its tensor on `device`, so that no step of a run has to move it."""
    return replace(intervention, vector=intervention.vector.to(device))  # type: ignore[type-var]
