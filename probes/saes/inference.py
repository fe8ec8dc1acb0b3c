"""Is a difference between two classes real, latent by latent? Sums over texts, a test, and false discoveries."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.late import stats

RATE = 0.05
"""The expected share of false ones among the latents that are declared (Benjamini and Hochberg 1995)."""


@dataclass(eq=False)
class Differences:
    """Of one difference a text and latent: running moments, and what they say. A text counts once.

    >>> import torch
    >>> from probes.saes import Differences
    >>> numbers = torch.Generator().manual_seed(0)
    >>> told = Differences.none(3)
    >>> for _ in range(50):
    ...     told.add(torch.tensor([1.0, 0.0, 0.0]) + 0.1 * torch.randn(3, generator=numbers))
    >>> told.declared().tolist()
    [True, False, False]
    """

    n: int
    total: Float[Tensor, " d_sae"]
    square: Float[Tensor, " d_sae"]

    @classmethod
    def none(cls, d_sae: int) -> "Differences":
        zero = torch.zeros(d_sae, dtype=torch.float64)
        return cls(0, zero, zero.clone())

    def add(self, difference: Float[Tensor, " d_sae"]) -> None:
        """Of one more text."""
        wide = difference.detach().double().cpu()
        self.n += 1
        self.total += wide
        self.square += wide.square()

    @property
    def mean(self) -> Float[Tensor, " d_sae"]:
        return self.total / max(self.n, 1)

    @property
    def error(self) -> Float[Tensor, " d_sae"]:
        """The standard error of the mean; 0 where every text has the same."""
        if self.n < 2:
            return torch.zeros_like(self.total)
        spread = (self.square - self.total.square() / self.n).clamp(min=0) / (self.n - 1)
        return (spread / self.n).sqrt()

    def interval(self) -> Float[Tensor, "2 d_sae"]:
        """The 95 % interval of the mean, by Student's t."""
        reach = float(stats.t.ppf(0.975, max(self.n - 1, 1))) * self.error
        return torch.stack([self.mean - reach, self.mean + reach])

    def p(self) -> Float[Tensor, " d_sae"]:
        """Of no difference, two-sided, by Student's t over texts; 1 for a latent that never differs."""
        return p_of(self.mean, self.error, self.n)

    def q(self) -> Float[Tensor, " d_sae"]:
        """The least rate of false discoveries at which a latent is declared."""
        return q_of(self.p())

    def declared(self, rate: float = RATE) -> Bool[Tensor, " d_sae"]:
        return self.q() <= rate


def p_of(mean: Float[Tensor, " d_sae"], error: Float[Tensor, " d_sae"], n: int) -> Float[Tensor, " d_sae"]:
    """Two-sided, by Student's t with n - 1 degrees of freedom; where all differ alike, by their signs."""
    told = error > 0
    t = (mean.abs() / error.where(told, torch.ones_like(error))).where(told, torch.zeros_like(error))
    p = torch.from_numpy(np.asarray(2 * stats.t.sf(t.numpy(), max(n - 1, 1))))
    alike = ~told & (mean != 0) & (n > 1)
    return p.masked_fill(alike, 2.0 ** (1 - n))


def q_of(p: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """By Benjamini and Hochberg, over the latents of which there is something to tell."""
    q, told = torch.ones_like(p), p < 1
    if told.any():
        q[told] = torch.from_numpy(stats.false_discovery_control(p[told].numpy()))
    return q
