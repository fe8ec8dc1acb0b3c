"""What the interventions do to the tokens of a pass, in plain tensor operations: no branch depends on data, so that it
can be captured. `kernel` does the same in one launch, where Triton is.

Every form is that of `steer.interventions`: float32 inside, the model's dtype at the door; an Add in the model's dtype.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thinksteer_vllm.tables import ABLATE, ADD, CLAMP, HIGH, LOW, ROTATE, SCALE, STRENGTH, TARGET, Place, Tokens

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # x, vector, numbers, multiple, strength


def edited(x: Tensor, place: Place, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The activation [n width] with what its tokens' recipes do here, and which tokens [n 1] are touched."""
    n = len(x)
    touched = torch.zeros(n, 1, dtype=torch.bool, device=x.device)
    strength = tokens.strength[:n, None]
    for step, kinds in zip(place.steps, place.kinds_at, strict=True):
        own = place.local[tokens.rows[step, :n]]
        kind, vector, numbers = place.kinds[own][:, None], place.vectors[own], place.numbers[own]
        multiple = tokens.multiples[step, :n, None]
        before = x
        for here in kinds:
            x = torch.where(kind == here, FORMS[here](before, vector, numbers, multiple, strength), x)
        touched |= kind > 0
    return x, touched


def edit_stream(hidden: Tensor, residual: Tensor, at: Sequence[Place], tokens: Tokens) -> None:
    """In place: the stream is hidden + residual, and a touched token has all of it in residual afterwards."""
    for place in at:
        new, touched = edited(hidden + residual, place, tokens)
        residual.copy_(torch.where(touched, new, residual))
        hidden.copy_(torch.where(touched, 0, hidden))


def edit_whole(x: Tensor, at: Sequence[Place], tokens: Tokens) -> None:
    """In place: what one tensor holds, or the heads of it."""
    for place in at:
        part = x if place.part is None else x[:, place.part]
        part.copy_(edited(part, place, tokens)[0])


def edit_results(z: Tensor, written: Tensor, at: Sequence[Place], tokens: Tokens) -> None:
    """In place: what heads contribute to `written`, the output of o_proj: their columns of it times their z."""
    for place in at:
        assert place.part is not None
        assert place.matrix is not None
        write = z[:, place.part].float() @ place.matrix
        new, touched = edited(write, place, tokens)
        written.copy_(torch.where(touched, written + (new - write).to(written.dtype), written))


def _add(x: Tensor, vector: Tensor, _: Tensor, multiple: Tensor, strength: Tensor) -> Tensor:
    return torch.addcmul(x, (multiple * strength).to(x.dtype), vector.to(x.dtype))


def _ablate(x: Tensor, unit: Tensor, numbers: Tensor, multiple: Tensor, strength: Tensor) -> Tensor:
    wide = x.float()
    projection = (wide * unit).sum(1, keepdim=True)
    return _along(wide, unit, numbers, multiple * strength, numbers[:, TARGET, None] - projection).to(x.dtype)


def _clamp(x: Tensor, unit: Tensor, numbers: Tensor, multiple: Tensor, strength: Tensor) -> Tensor:
    wide = x.float()
    projection = (wide * unit).sum(1, keepdim=True)
    kept = torch.minimum(torch.maximum(projection, numbers[:, LOW, None]), numbers[:, HIGH, None])
    return _along(wide, unit, numbers, multiple * strength, kept - projection).to(x.dtype)


def _along(wide: Tensor, unit: Tensor, numbers: Tensor, factor: Tensor, change: Tensor) -> Tensor:
    return wide + factor * numbers[:, STRENGTH, None] * change * unit


def _scale(x: Tensor, _: Tensor, numbers: Tensor, multiple: Tensor, strength: Tensor) -> Tensor:
    scale = strength * numbers[:, STRENGTH, None]
    return torch.where(multiple == 1, x * scale.to(x.dtype), (x.float() * (1 + multiple * (scale - 1))).to(x.dtype))


def _rotate(x: Tensor, vector: Tensor, numbers: Tensor, multiple: Tensor, strength: Tensor) -> Tensor:
    wide = x.float()
    new = wide + strength * numbers[:, STRENGTH, None] * vector
    length = new.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    turned = new * (wide.norm(dim=1, keepdim=True) / length)
    return torch.where(multiple == 1, turned, wide + multiple * (turned - wide)).to(x.dtype)


FORMS: dict[int, Form] = {ADD: _add, ABLATE: _ablate, SCALE: _scale, CLAMP: _clamp, ROTATE: _rotate}
