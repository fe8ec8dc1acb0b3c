"""Moments that stream: constant memory, and the same whatever way the rows are cut into batches."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from probes.tables import Brief


@dataclass(frozen=True, repr=False)
class Moments(Brief):
    """Count and float64 sum of rows seen; `a + b` merges, in any order and grouping.

    >>> import torch
    >>> from probes.activations import Moments
    >>> both = Moments.of(torch.tensor([[1.0, 2.0]])) + Moments.of(torch.tensor([[3.0, 6.0], [5.0, 4.0]]))
    >>> both.count, both.mean.tolist()
    (3, [3.0, 4.0])
    """

    count: int
    total: Float[Tensor, " width"]

    @classmethod
    def of(cls, rows: Float[Tensor, "n width"]) -> "Moments":
        return cls(len(rows), rows.double().sum(0))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total.to(self.total.device))

    @property
    def mean(self) -> Float[Tensor, " width"]:
        if self.count == 0:
            raise ValueError("The mean of no rows is asked for.")
        return self.total / self.count
