"""What the steps of one pass changed, as norms: of a decode step in two operations, of a longer pass as it comes."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from steer.interventions.affine import widened

Norms = dict[int, tuple[Float[Tensor, " tokens"], float | Float[Tensor, " tokens"]]]
"""By step, of what it met and of what it changed; one number, where that is the same at every token."""


@dataclass(eq=False)
class Noted:
    """The activations of the steps of one pass, before and after; `norms` are of the steps asked for.

    In a decode step activations are only kept, and their norms are taken together when it is over. That is right where
    nothing writes into them meanwhile, as some model code might: of a step's first pass norms are taken at once, and
    its activations watched; where they change, that stays so.
    """

    norms: Norms = field(default_factory=dict)
    held: dict[int, tuple[Tensor, float | Tensor, tuple[int, ...]]] = field(default_factory=dict)
    quiet: dict[int, bool] = field(default_factory=dict)  # of each step, whether its activations stay as they were

    def note(
        self, step: int, x: Float[Tensor, "batch new width"], change: float | Float[Tensor, "batch new width"]
    ) -> None:
        """A step met `x`, and made another tensor of it; or adds one vector, of which the norm is told."""
        x = x.detach()
        quiet = self.quiet.get(step)
        may_hold = x.shape[1] == 1 and not x.is_inference() and quiet is not False
        if not (may_hold and quiet):
            self.norms[step] = (_norm(x), change if isinstance(change, float) else _change(x, change))
        if may_hold:
            self.held[step] = (x, change, _versions(x, change))

    def note_norms(self, step: int, before: Float[Tensor, "batch new"], change: Float[Tensor, "batch new"]) -> None:
        self.norms[step] = (before.detach().flatten(), change.detach().flatten())

    def take(self) -> Norms:
        """The pass is over: the norms of all that was noted, of what was kept those of one shape together."""
        kinds: dict[tuple[object, ...], list[int]] = {}
        for step, (x, change, versions) in self.held.items():
            still = _versions(x, change) == versions
            if self.quiet.setdefault(step, still) and not still:
                raise RuntimeError(
                    "The model wrote into an activation that was steered, as it did not in its first pass."
                )
            if step not in self.norms:
                kinds.setdefault((x.shape, x.dtype, x.device, isinstance(change, float)), []).append(step)
        for steps in kinds.values():
            befores = torch.stack([self.held[step][0] for step in steps])
            changes = [self.held[step][1] for step in steps]
            before = _norm(befores).unflatten(0, (len(steps), -1))
            if isinstance(changes[0], Tensor):
                after = torch.stack([change for change in changes if isinstance(change, Tensor)]).detach()
                changes = list(_change(befores, after).unflatten(0, (len(steps), -1)).unbind())
            self.norms |= dict(zip(steps, zip(before.unbind(), changes, strict=True), strict=True))
        self.held.clear()
        norms, self.norms = self.norms, {}
        return norms


def _norm(x: Float[Tensor, "*rows width"]) -> Float[Tensor, " all_rows"]:
    dtype = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    return norm.flatten()


def _change(x: Float[Tensor, "*rows width"], new: Float[Tensor, "*rows width"]) -> Float[Tensor, " all_rows"]:
    return _norm(widened(new.detach()) - widened(x))


def _versions(x: Tensor, change: float | Tensor) -> tuple[int, ...]:
    return tuple(part._version for part in (x, change) if isinstance(part, Tensor))
