"""What the steps of one pass changed, as norms: of a decode step in two operations, of a longer pass as it comes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from steer.interventions.affine import widened

Change = float | Float[Tensor, "batch new width"]


@dataclass(frozen=True, eq=False)
class Norms:
    """Of some steps behind one gate, in one pass: the norms of what they met, and of what they changed.

    Where they add a vector (`adds`), its norm, which the gate's multiples then scale, is all there is to say.
    """

    gate: int
    steps: tuple[int, ...]
    before: Float[Tensor, "steps tokens"]
    change: Float[Tensor, "steps tokens_or_1"]
    adds: bool


@dataclass(eq=False)
class _Kind:
    """Steps of one gate whose norms can be taken together. `quiet`: do their activations stay as they were?"""

    gate: int
    adds: bool
    quiet: bool | None = None
    norms: dict[int, tuple[Tensor, float | Tensor]] = field(default_factory=dict)
    held: dict[int, tuple[Tensor, float | Tensor, tuple[int, ...]]] = field(default_factory=dict)
    added: tuple[tuple[float, ...], Tensor] = ((), torch.zeros(0))  # the norms of the vectors that are added

    def take(self) -> Norms:
        still = all(_versions(x, change) == versions for x, change, versions in self.held.values())
        if self.held and self.quiet is None:
            self.quiet = still
        if not still and self.quiet:
            raise RuntimeError("The model wrote into an activation that was steered, as it did not in its first pass.")
        steps = tuple(self.norms or self.held)
        before, change = self._of_norms() if self.norms else self._of_held()
        self.norms.clear()
        self.held.clear()
        return Norms(self.gate, steps, before, change, self.adds)

    def _of_norms(self) -> tuple[Tensor, Tensor]:
        before = torch.stack([before for before, _ in self.norms.values()])
        return before, self._stacked([change for _, change in self.norms.values()], before.device)

    def _of_held(self) -> tuple[Tensor, Tensor]:
        befores = torch.stack([x for x, _, _ in self.held.values()])
        before, changes = (
            _norm(befores).unflatten(0, (len(befores), -1)),
            [change for _, change, _ in self.held.values()],
        )
        after = [change for change in changes if isinstance(change, Tensor)]
        if not after:
            return before, self._stacked(changes, before.device)
        return before, _change(befores, torch.stack(after)).unflatten(0, (len(befores), -1))

    def _stacked(self, changes: Sequence[float | Tensor], device: torch.device) -> Tensor:
        told = tuple(change for change in changes if isinstance(change, float))
        if not told:
            return torch.stack([change for change in changes if isinstance(change, Tensor)])
        if self.added[0] != told or self.added[1].device != device:  # made once, not in every step
            self.added = told, torch.tensor(told, device=device)[:, None]
        return self.added[1]


class Noted:
    """The activations of the steps of one pass, before and after. `gates`: of each step, which it is behind.

    In a decode step activations are only kept, and their norms are taken together when it is over. That is right where
    nothing writes into them meanwhile, as some model code might: of the first such pass norms are taken at once, and
    its activations watched; where they change, that stays so.
    """

    def __init__(self, gates: Sequence[int]) -> None:
        self._gates, self._of = gates, dict[int, _Kind]()
        self._kinds: dict[tuple[object, ...], _Kind] = {}

    def note(self, step: int, x: Float[Tensor, "batch new width"], change: Change) -> None:
        """A step met `x`, and made another tensor of it; or adds one vector, of which the norm is told."""
        kind = self._of.get(step) or self._kind(step, x, change)
        may_hold = x.shape[1] == 1 and kind.quiet is not False and not x.is_inference()
        if may_hold:
            kind.held[step] = (x, change, _versions(x, change))
        if not (may_hold and kind.quiet):
            with torch.no_grad():
                kind.norms[step] = (_norm(x), change if isinstance(change, float) else _change(x, change))

    def note_norms(self, step: int, before: Float[Tensor, "batch new"], change: Float[Tensor, "batch new"]) -> None:
        kind = self._of.get(step) or self._kind(step, before, change)
        kind.norms[step] = (before.detach().flatten(), change.detach().flatten())

    @torch.no_grad()
    def take(self) -> list[Norms]:
        """The pass is over: the norms of all that was noted, of what can be taken together in one."""
        return [kind.take() for kind in self._kinds.values() if kind.norms or kind.held]

    def _kind(self, step: int, x: Tensor, change: float | Tensor) -> _Kind:
        gate, adds = self._gates[step], isinstance(change, float)
        key = (gate, adds, x.device, x.shape[2:])
        kind = self._of[step] = self._kinds.setdefault(key, _Kind(gate, adds))
        return kind


def _norm(x: Float[Tensor, "*rows width"]) -> Float[Tensor, " all_rows"]:
    dtype = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    return norm.flatten()


def _change(x: Float[Tensor, "*rows width"], new: Float[Tensor, "*rows width"]) -> Float[Tensor, " all_rows"]:
    return _norm(widened(new) - widened(x))


def _versions(x: Tensor, change: float | Tensor) -> tuple[int, ...]:
    return (x._version,) if isinstance(change, float) else (x._version, change._version)
