"""What a vector must be before anything is done with it: one row of finite floating-point numbers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def check_row(vector: Tensor, where: str) -> None:
    """Raise ValueError, naming `where`, for a tensor of another shape or dtype, and for NaN or infinite entries.

    A column would be stretched over positions, and an integer rounds what it is multiplied by, both without a word.
    """
    if vector.ndim != 1:
        raise ValueError(f"The vector for {where} has shape {list(vector.shape)}. Give one row of numbers: [width].")
    if not vector.is_floating_point():
        raise ValueError(f"The vector for {where} has dtype {vector.dtype}. Give floating-point numbers.")
    if not vector.isfinite().all():
        raise ValueError(
            f"The vector for {where} holds NaN or infinite entries. Derive it again: was a class empty, or did the "
            "model's dtype overflow?"
        )


def check_number(value: float, name: str, where: str) -> None:
    """Raise ValueError, naming `where`, for a number that is not finite in float32."""
    if not torch.tensor(float(value), dtype=torch.float32).isfinite():
        raise ValueError(f"{where} has {name} {value}. Give a finite number, that float32 can hold.")


def number_in(fields: Mapping[str, Any], key: str, where: str) -> float:
    """The number under a key of what a file holds. Raises ValueError, naming `where`, for anything else."""
    value = fields[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} has {key} {value!r}, which is no number.")
    return float(value)
