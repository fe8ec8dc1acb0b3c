"""Moments that stream: constant memory, and the same whatever way the rows are cut into batches."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from probes.tables import Brief


@dataclass(frozen=True, repr=False)
class Moments(Brief):
    """Count and float64 sum of rows seen; `a + b` merges, in any order and grouping.

    Sums over rows [n, width]; `mean` raises ValueError where no row was seen.

    >>> import torch
    >>> from probes.activations import Moments
    >>> rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]])
    >>> (Moments.of(rows[:2]) + Moments.of(rows[2:])).mean
    tensor([3., 2.], dtype=torch.float64)
    """

    count: int
    total: Float[Tensor, " width"]

    @classmethod
    def of(cls, rows: Float[Tensor, "n width"]) -> "Moments":
        """The moments of rows."""
        return cls(len(rows), rows.double().sum(0))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total.to(self.total.device))

    @property
    def mean(self) -> Float[Tensor, " width"]:
        """The mean of the rows, in float64. Raises ValueError where there are none."""
        if self.count == 0:
            raise ValueError("The mean of no rows is asked for.")
        return self.total / self.count
