"""Which steps touch which tokens, and by what multiple: the scopes of all recipes as tables, asked in one go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinksteer_vllm.machine import Ids
from thinksteer_vllm.recipes import PHASES, Recipe, Scope

_NEVER = 2**40
_SHAPES = (None, "linear", "cosine", "step")
Where = tuple[Tensor, Tensor, Tensor, Tensor]  # phase [n], thought [n], marked [markers n], ids [n]


@dataclass(frozen=True, eq=False)
class Scopes:
    """By recipe and step. `rows` are those of the table of interventions, 0 where a recipe has fewer steps."""

    rows: Tensor
    phase: Tensor
    first: Tensor
    last: Tensor
    marker: Tensor
    after: Tensor
    listing: Tensor
    listed: Tensor  # by listing: is an id listed; the first lists all
    shape: Tensor
    course: Tensor  # start, what is added to its end, over
    counts: Tensor
    control: Tensor  # gain, set-point
    constant: bool  # has no step a schedule or a controller?

    @classmethod
    def of(cls, recipes: Sequence[Recipe], markers: Sequence[tuple[Ids, ...]], device: torch.device) -> "Scopes":
        longest = max((len(recipe.steps) for recipe in recipes), default=0)
        padded = [
            [step.scope for step in recipe.steps] + [Scope()] * (longest - len(recipe.steps)) for recipe in recipes
        ]
        every = [scope for row in padded for scope in row]
        lists = list(dict.fromkeys([(), *(scope.tokens for scope in every)]))

        def table(of: Callable[[Scope], object], dtype: torch.dtype = torch.long) -> Tensor:
            return torch.tensor([[of(scope) for scope in row] for row in padded], dtype=dtype, device=device)

        number, rows = 0, []
        for recipe in recipes:
            own = list(range(number + 1, number + 1 + len(recipe.steps)))
            number += len(own)
            rows.append(own + [0] * (longest - len(own)))
        return cls(
            rows=torch.tensor(rows, dtype=torch.long, device=device),
            phase=table(lambda s: PHASES.index(s.phase)),
            first=table(lambda s: s.window[0] or -1),
            last=table(lambda s: _NEVER if s.window[1] is None else s.window[1]),
            marker=table(lambda s: markers.index(s.markers) if s.after else 0),
            after=table(lambda s: s.after),
            listing=table(lambda s: lists.index(s.tokens)),
            listed=_listed(lists).to(device),
            shape=table(lambda s: _SHAPES.index(None if s.schedule is None else s.schedule.shape)),
            course=table(_course, torch.float32),
            counts=table(lambda s: s.controller is not None, torch.bool),
            control=table(_control, torch.float32),
            constant=all(scope.schedule is None and scope.controller is None for scope in every),
        )

    def touch(self, recipe: Tensor, where: Where) -> tuple[Tensor, Tensor]:
        """Of tokens of these recipes: rows [n steps], 0 where a step does not touch, and multiples, broadcast to it."""
        phase, thought, marked, ids = (x[..., None] for x in where)
        rows, wanted = self.rows[recipe], self.phase[recipe]
        hit = (wanted == phase) | (wanted == PHASES.index("all"))
        hit &= (thought >= self.first[recipe]) & (thought < self.last[recipe])
        if len(marked):
            hit &= marked[..., 0].T.gather(1, self.marker[recipe]) >= self.after[recipe]
        if len(self.listed) > 1:
            hit &= self.listed[self.listing[recipe], ids.clamp(max=self.listed.shape[1] - 1)]
        return rows * hit, thought.new_ones(1, 1).float() if self.constant else self._multiple(recipe, thought.float())

    def _multiple(self, recipe: Tensor, thought: Tensor) -> Tensor:
        shape, course = self.shape[recipe], self.course[recipe]
        start, rise, over = course.unbind(-1)
        u = (thought / over).clamp(0, 1)
        linear = start + rise * u
        cosine = start + rise - rise * (1 + torch.cos(torch.pi * u)) / 2
        multiple = torch.where(shape == 1, linear, torch.where(shape == 2, cosine, 1.0))
        multiple = torch.where(shape == 3, torch.where(u < 1, start, start + rise), multiple)
        gain, set_point = self.control[recipe].unbind(-1)
        told = (gain * (1 - thought / set_point)).clamp(-1, 1)
        return torch.where(self.counts[recipe], multiple * told, multiple)


def _course(scope: Scope) -> tuple[float, float, float]:
    s = scope.schedule
    return (1.0, 0.0, 1.0) if s is None else (s.start, s.end - s.start, s.over)


def _control(scope: Scope) -> tuple[float, float]:
    c = scope.controller
    return (0.0, 1.0) if c is None else (c.gain, c.set_point)


def _listed(lists: Sequence[Ids]) -> Tensor:
    """The last column is that of all ids beyond."""
    table = torch.zeros(len(lists), max((max(ids, default=0) for ids in lists), default=0) + 2, dtype=torch.bool)
    table[0] = True
    for row, ids in enumerate(lists):
        table[row, list(ids)] = True
    return table
