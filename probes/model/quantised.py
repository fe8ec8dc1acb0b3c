"""Weights that are packed integers or 8-bit floats: how to tell them, and how to read them all the same."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

_WHOLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_packed(weight: Tensor) -> bool:
    """Is this tensor something else than the numbers it stands for?"""
    return weight.dtype not in _WHOLE


def is_quantised(model: nn.Module) -> bool:
    """Are some of the model's weights packed?

    >>> from probes.model import is_quantised, load
    >>> is_quantised(load("organism"))
    False
    """
    return any(is_packed(parameter) for parameter in model.parameters())


@torch.no_grad()
def computed_weight(module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """What a Linear of any packing multiplies by: its output on the identity, in float32."""
    device = module.get_parameter("weight").device
    identity = torch.eye(int(getattr(module, "in_features")), device=device)
    rows = module.forward(identity).float()  # not called: no hook is to see it
    out: Tensor = (rows if module.bias is None else rows - module.bias.float()).T
    return out
