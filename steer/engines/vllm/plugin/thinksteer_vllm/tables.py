"""All that a pass looks up: what each row of the table of interventions does, place by place, and which rows each token
has. Made once, before anything is captured, and only written into afterwards: its addresses never change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinksteer_vllm.recipes import SITES, Recipe, Step

ADD, ABLATE, SCALE, CLAMP, ROTATE = range(1, 6)
KINDS = {"add": ADD, "ablate": ABLATE, "scale": SCALE, "clamp": CLAMP, "rotate": ROTATE}
STRENGTH, TARGET, LOW, HIGH = range(4)  # columns of `numbers`


@dataclass(frozen=True, eq=False)
class Tokens:
    """Of each token of a pass, up to as many as there can be: its row in the table for each step of its recipe (0: not
    touched), the multiples of the scopes, and what its request multiplies all strengths by."""

    rows: Tensor
    multiples: Tensor
    strength: Tensor
    views: dict[int, tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]] = field(default_factory=dict, repr=False)

    def first(self, n: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """Of the first tokens: rows [n] and multiples [n 1] by step, and strength [n 1]. Views, kept for the places
        of a pass."""
        if n not in self.views:
            self.views.clear()
            self.views[n] = self.rows[:, :n].unbind(), self.multiples[:, :n, None].unbind(), self.strength[:n, None]
        return self.views[n]

    @classmethod
    def of(cls, n_steps: int, n_tokens: int, device: torch.device) -> "Tokens":
        rows = torch.zeros(n_steps, n_tokens, dtype=torch.long, device=device)
        return cls(rows, torch.ones(n_steps, n_tokens, device=device), torch.ones(n_tokens, device=device))


@dataclass(frozen=True, eq=False)
class Place:
    """The interventions at one site, or at one head of it.

    `steps` are the numbers of the steps that may be here, in order, with the kinds that they may have. `local` leads
    from a row of the whole table to one of `kinds`, `vectors` (units where a projection is meant; an Add's with its
    strength) and `numbers`; row 0 does nothing. `part` is the slice of the activation that a head is.
    """

    steps: tuple[int, ...]
    kinds_at: tuple[tuple[int, ...], ...]
    local: Tensor
    kinds: Tensor
    vectors: Tensor
    numbers: Tensor
    part: slice | None = None
    matrix: Tensor | None = None  # of a head's result: [d_head d_model]
    order: Tensor | None = None  # `steps` on the device


def index_of(layer: int, site: str) -> int:
    """How a place is told to the operation that edits it."""
    return layer * len(SITES) + SITES.index(site)


def places(
    recipes: Sequence[Recipe], widths: Mapping[str, int], dtype: torch.dtype, device: torch.device
) -> dict[tuple[int, str, int], Place]:
    """By layer, site and head (-1: whole). `widths` are those of the stream, of z, and of a head's z."""
    rows: dict[tuple[int, str, int], list[tuple[int, int, Step]]] = {}
    number = 0
    for recipe in recipes:
        for k, step in enumerate(recipe.steps):
            number += 1
            rows.setdefault(step.place, []).append((number, k, step))
    return {place: _place(rows[place], number, widths, dtype, device) for place in sorted(rows)}


def _place(
    rows: Sequence[tuple[int, int, Step]],
    total: int,
    widths: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Place:
    _, site, head = rows[0][2].place
    d_head, width = widths["head"], widths["z" if site == "z" and head < 0 else "head" if site == "z" else "stream"]
    local = torch.zeros(total + 1, dtype=torch.long)
    kinds, vectors = torch.zeros(len(rows) + 1, dtype=torch.long), torch.zeros(len(rows) + 1, width)
    numbers = torch.zeros(len(rows) + 1, 4)
    for i, (number, _, step) in enumerate(rows, start=1):
        local[number], kinds[i] = i, KINDS[step.kind]
        numbers[i] = torch.tensor([step.strength, *(step.numbers.get(name, 0.0) for name in ("target", "low", "high"))])
        if step.vector is not None:
            vectors[i] = _row(step, dtype)
    steps = sorted({k for _, k, _ in rows})
    at = tuple(tuple(sorted({KINDS[step.kind] for _, k, step in rows if k == own})) for own in steps)
    part = slice(head * d_head, (head + 1) * d_head) if head >= 0 else None
    held = (tensor.to(device) for tensor in (local, kinds, vectors, numbers))
    return Place(tuple(steps), at, *held, part, None, torch.tensor(steps, device=device))


def _row(step: Step, dtype: torch.dtype) -> Tensor:
    assert step.vector is not None
    vector = step.vector.float()
    if step.kind == "add":
        return (step.strength * vector).to(dtype).float()
    return vector if step.kind == "rotate" else vector / vector.norm()
