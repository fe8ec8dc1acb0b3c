"""What the interventions do to the tokens of a pass, in plain tensor operations: no branch depends on data, so that it
can be captured. `kernel` does the same in one launch, where Triton is.

Every form is that of `steer.interventions`: float32 inside, the model's dtype at the door; an Add in the model's dtype.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thinksteer_vllm.tables import ABLATE, ADD, CLAMP, HIGH, LOW, ROTATE, SCALE, STRENGTH, TARGET, Place, Tokens

Columns = Sequence[Tensor]  # of `Place.numbers`, each [n 1]
Form = Callable[[Tensor, Tensor, Columns, Tensor, Tensor], Tensor]  # x, vector, numbers, multiple, strength


def edited(x: Tensor, place: Place, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The activation [n width] with what its tokens' recipes do here, and which tokens [n 1] are touched."""
    touched = None
    rows, multiples, strength = tokens.first(len(x))
    for step, kinds in zip(place.steps, place.kinds_at, strict=True):
        own = place.local.index_select(0, rows[step])
        vector, numbers = place.vectors.index_select(0, own), place.numbers.index_select(0, own)[..., None].unbind(1)
        here, before = (own > 0)[:, None], x
        kind = place.kinds.index_select(0, own)[:, None] if len(kinds) > 1 else None
        for name in kinds:
            mine = here if kind is None else kind == name
            x = torch.where(mine, FORMS[name](before, vector, numbers, multiples[step], strength), x)
        touched = here if touched is None else touched | here
    assert touched is not None
    return x, touched


def edit_stream(hidden: Tensor, residual: Tensor, at: Sequence[Place], tokens: Tokens) -> None:
    """In place: the stream is hidden + residual, and a touched token has all of it in residual afterwards."""
    for place in at:
        new, touched = edited(hidden + residual, place, tokens)
        torch.where(touched, new, residual, out=residual)
        hidden.masked_fill_(touched, 0)


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


def _add(x: Tensor, vector: Tensor, _: Columns, multiple: Tensor, strength: Tensor) -> Tensor:
    return torch.addcmul(x, (multiple * strength).to(x.dtype), vector.to(x.dtype))


def _ablate(x: Tensor, unit: Tensor, numbers: Columns, multiple: Tensor, strength: Tensor) -> Tensor:
    wide = x.float()
    change = numbers[TARGET] - (wide * unit).sum(1, keepdim=True)
    return torch.addcmul(wide, multiple * strength * numbers[STRENGTH] * change, unit).to(x.dtype)


def _clamp(x: Tensor, unit: Tensor, numbers: Columns, multiple: Tensor, strength: Tensor) -> Tensor:
    wide = x.float()
    projection = (wide * unit).sum(1, keepdim=True)
    change = torch.minimum(torch.maximum(projection, numbers[LOW]), numbers[HIGH]) - projection
    return torch.addcmul(wide, multiple * strength * numbers[STRENGTH] * change, unit).to(x.dtype)


def _scale(x: Tensor, _: Tensor, numbers: Columns, multiple: Tensor, strength: Tensor) -> Tensor:
    scale = strength * numbers[STRENGTH]
    return torch.where(multiple == 1, x * scale.to(x.dtype), (x.float() * (1 + multiple * (scale - 1))).to(x.dtype))


def _rotate(x: Tensor, vector: Tensor, numbers: Columns, multiple: Tensor, strength: Tensor) -> Tensor:
    wide = x.float()
    new = wide + strength * numbers[STRENGTH] * vector
    length = new.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    turned = new * (wide.norm(dim=1, keepdim=True) / length)
    return torch.where(multiple == 1, turned, wide + multiple * (turned - wide)).to(x.dtype)


FORMS: dict[int, Form] = {ADD: _add, ABLATE: _ablate, SCALE: _scale, CLAMP: _clamp, ROTATE: _rotate}
