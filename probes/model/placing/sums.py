"""Is one activation the sum of others, or the same, but for rounding? And what a short pass is made of."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from probes.model.architectures import config_of

SHAPE = (2, 5)  # rows and tokens of the pass that is looked at


def add_up(whole: Tensor, parts: list[Tensor]) -> bool:
    """Is `whole` the sum, each part with factor one? By the part's own size, and what rounding may leave."""
    rest = whole.double() - torch.stack([part.double() for part in parts]).sum(0)
    rounding = torch.finfo(whole.dtype).eps * float(whole.double().norm())  # an addition leaves half of it at most
    norms = [float(part.double().norm()) for part in parts]
    factors = (
        float((rest * part.double()).sum()) / max(norm, 1e-30) ** 2 for part, norm in zip(parts, norms, strict=True)
    )
    # Rounding is no friend of any one part, so of a factor it moves only what chance allows.
    slack = (1e-2 + 2 * rounding / max(norm, 1e-30) / whole.numel() ** 0.5 for norm in norms)
    within = all(abs(factor) < most for factor, most in zip(factors, slack, strict=True))
    return within and float(rest.norm()) < rounding + 1e-2 * min(norms)


def carries(whole: Tensor, base: Tensor, added: Tensor) -> bool:
    """Is `whole` the sum of what is added and the base times some number?"""
    rest, base = (whole - added).double(), base.double()
    return add_up(whole, [base * float((rest * base).sum() / (base * base).sum().clamp(min=1e-30)), added])


def close(left: Tensor, right: Tensor) -> bool:
    """Equal but for rounding in the model's dtype (at most bfloat16's)."""
    if left.shape != right.shape:
        return False
    left, right = left.float(), right.float().to(left.device)
    return float((left - right).norm()) <= 2e-2 * float(left.norm())


def random_ids(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config_of(model).vocab_size, SHAPE, generator=generator).to(model.device)
