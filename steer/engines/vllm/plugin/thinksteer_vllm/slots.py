"""The states of many requests in one tensor, moved on by one token each: what `Track` says, in tensor operations.

A decode token of an asynchronous engine is known on the device only, so nothing here leaves it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from thinksteer_vllm.machine import CODES, CONTROL, COUNTS, THOUGHTS, Machine


@dataclass(frozen=True, eq=False)
class Slots:
    """`state` has one row a slot; the rest is the machine, on the device."""

    state: Tensor
    kinds: Tensor
    moves: Tensor
    codes: Tensor
    turns: Tensor
    ways: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, machine: Machine, n: int, device: torch.device) -> "Slots":
        state = torch.tensor([machine.begin()], device=device).repeat(n, 1)
        held = (torch.from_numpy(x).to(device) for x in (machine.kinds, machine.moves, machine.codes, machine.turns))
        return cls(state, *held, machine.ways)

    def put(self, slots: list[int], states: list[list[int]]) -> None:
        """The states of some slots, as tracks have them."""
        device = self.state.device
        self.state[torch.tensor(slots, device=device)] = torch.tensor(states, device=device)

    def step(self, slots: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take in one token of each of these slots: phase [n], thought [n], marked [markers n]."""
        before, n_ways = self.state[slots], len(self.ways)
        bits = before[:, COUNTS + n_ways :]
        starts, inner, length, last = self.moves[self.kinds[ids.clamp(max=len(self.kinds) - 1)]].unbind(1)
        hits = (bits & last) != 0
        code = (hits * self.codes).sum(1)
        control, phase, thinks, fresh, _ = self.turns[before[:, CONTROL] * CODES + code].unbind(1)
        thoughts = before[:, THOUGHTS] * fresh + thinks
        counts = [before[:, COUNTS + i] * fresh + hits[:, a:b].any(1) * thinks for i, (a, b) in enumerate(self.ways)]
        after = torch.cat(
            [torch.stack([control, thoughts, *counts], dim=1), starts | ((bits & inner) << length)], dim=1
        )
        self.state[slots] = after
        marked = torch.stack(counts) if counts else before.new_zeros(0, len(before))
        return phase, thoughts * thinks - 1, marked
