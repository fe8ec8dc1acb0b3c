"""The operations that edit, as torch knows them: opaque to a compiler, and able to be captured.

A model's graph holds only the number of a place, never what is done there: it does not depend on the recipes.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from thinksteer_vllm.edits import edit_results, edit_stream, edit_whole
from thinksteer_vllm.engine import kernel
from thinksteer_vllm.steering import Steering
from thinksteer_vllm.tables import Place, Tokens

_HELD: dict[str, Any] = {}  # what this process steers with: one model a process


def hold(steering: Steering) -> None:
    _HELD.update(steering=steering, table=steering.table())


def held() -> Steering | None:
    """None where this process does not steer."""
    return _HELD.get("steering")


@cache
def register() -> object:
    """Once a process. The library must live as long as its operations."""
    from vllm.utils.torch_utils import direct_register_custom_op

    library = torch.library.Library("thinksteer", "FRAGMENT")
    for function, changed in ((stream, ["hidden", "residual"]), (whole, ["x"]), (results, ["written"])):
        direct_register_custom_op(function.__name__, function, changed, _nothing, library)
    return library


def stream(hidden: Tensor, residual: Tensor, place: int) -> None:
    at, tokens = _at(place, hidden)
    if at and kernel.runs_on(hidden):
        kernel.edit(hidden, residual, at, tokens)
    elif at:
        edit_stream(hidden, residual, at, tokens)


def whole(x: Tensor, place: int) -> None:
    at, tokens = _at(place, x)
    if at and kernel.runs_on(x):
        kernel.edit(x, None, at, tokens)
    elif at:
        edit_whole(x, at, tokens)


def results(z: Tensor, written: Tensor, place: int) -> None:
    at, tokens = _at(place, z)
    if at:
        edit_results(z, written, at, tokens)


def _at(place: int, x: Tensor) -> tuple[list[Place], Tokens]:
    tokens = _HELD["steering"].tokens
    if len(x) > tokens.rows.shape[1]:
        raise RuntimeError(
            f"A pass has {len(x)} tokens, and thinksteer's tables were made for {tokens.rows.shape[1]}. "
            "Raise max_num_batched_tokens."
        )
    return _HELD["table"].get(place, []), tokens


def _nothing(*_: Any) -> None:
    """What a compiler runs in place of each, to learn of shapes."""
