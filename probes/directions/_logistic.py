"""Logistic regression in closed enough form: Newton's method in float64, the ridge in units of the features."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_STEPS, _CLOSE = 50, 1e-10


def fit_logistic(
    x: Float[Tensor, "n width"], y: Bool[Tensor, " n"], *, ridge: float = 1e-2
) -> tuple[Float[Tensor, " width"], float]:
    """The vector and offset of log odds x.vector + offset, by maximum likelihood with a ridge on standardised features.

    The offset is not shrunk. Raises ValueError where there is only one class.
    """
    if y.all() or not y.any():
        raise ValueError(f"Two classes are told apart, but all {len(y)} examples are of one.")
    x = x.double()
    mean, scale = x.mean(0), x.std(0, unbiased=False)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    z = torch.cat([(x - mean) / scale, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    penalty = torch.full((z.shape[1],), ridge * len(x), dtype=torch.float64)
    penalty[-1] = 0
    weights = torch.zeros(z.shape[1], dtype=torch.float64)
    weights[-1] = torch.logit(y.double().mean())
    for _ in range(_STEPS):
        p = torch.sigmoid(z @ weights)
        slope = z.T @ (p - y.double()) + penalty * weights
        curve = (z * (p * (1 - p))[:, None]).T @ z + torch.diag(penalty + 1e-9)
        step = torch.linalg.solve(curve, slope)
        weights = weights - step
        if float(step.abs().max()) < _CLOSE:
            break
    vector = weights[:-1] / scale
    return vector, float(weights[-1] - vector @ mean)
