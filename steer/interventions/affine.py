"""The linear form of an intervention, which weights can hold."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from probes.tables import Brief


@dataclass(frozen=True, eq=False, repr=False)
class Affine(Brief):
    """x + (x down) up + shift: the identity, a change of low rank, and a shift. Computed in float32.

    It takes activations [*batch width] of any dtype, and gives them back in the same dtype.

    >>> import torch
    >>> from steer.interventions import Affine
    >>> change = Affine(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 5.0]))
    >>> change(torch.tensor([3.0, 1.0]))
    tensor([6., 6.])
    >>> change.then(change)(torch.tensor([3.0, 1.0]))
    tensor([12., 11.])
    """

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
class Linear(Protocol):
    """An intervention whose change is an affine map, which weights can hold."""

    def affine(self, width: int) -> Affine: ...


def widened(x: Tensor) -> Tensor:
    """At least float32: what is computed inside."""
    return x if x.dtype == torch.float64 else x.float()
