"""A norm whose scale is frozen at what it was for one input: what it then does to each summand of that input."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.model.placing.sums import close


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """norm(x) = scale * gain ⊙ c(x) + bias at one x, where c takes the mean out of x, or does nothing.

    In float64, on the CPU; found by calling the norm, so that no family's form of it need be known.
    """

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    scale: float
    centred: bool

    @classmethod
    def of(cls, norm: nn.Module | None, x: Float[Tensor, " d_model"]) -> "FrozenNorm":
        """That of a norm at x; without a norm, what changes nothing."""
        ones = torch.ones(len(x), dtype=torch.float64)
        if norm is None:
            return cls(ones, 0 * ones, 1.0, False)
        signs = torch.ones_like(x)
        signs[::2] = -1

        def put(x: Tensor) -> Tensor:
            out: Tensor = norm(x[None])[0]
            return out.detach().double().cpu()

        up, down = put(signs), put(-signs)
        bias = (up + down) / 2
        centred = close(put(signs + 0.5), up)
        rule = cls(ones, bias, 1.0, centred)
        gain = (up - down) / 2 / rule._taken(signs.double().cpu())
        base = gain * rule._taken(x.double().cpu())
        scale = float(((put(x) - bias) * base).sum() / (base * base).sum().clamp(min=1e-300))
        return cls(gain, bias, scale, centred)

    def back(self, v: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """The vector w of which w . x is v . (norm(x) - bias)."""
        return self._taken(v * self.gain) * self.scale

    def _taken(self, x: Tensor) -> Tensor:
        return x - x.mean() if self.centred else x
