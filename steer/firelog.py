"""What an applied recipe really touched: by step and phase, how many tokens, where, and how hard."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.tables import Table
from steer.clock import PHASES, Clock
from steer.gates import Gate

_NEVER = 2**62


@dataclass(eq=False)
class _Sums:
    """By step and phase, over all passes: tokens, the sum and the largest of the ratios, first and last position."""

    tokens: Int[Tensor, "steps phases"]
    ratio: Float[Tensor, "steps phases"]
    largest: Float[Tensor, "steps phases"]
    first: Int[Tensor, "steps phases"]
    last: Int[Tensor, "steps phases"]

    @classmethod
    def none(cls, steps: int, device: torch.device) -> "_Sums":
        shape, exact = (steps, len(PHASES)), torch.float32 if device.type == "mps" else torch.float64
        return cls(
            torch.zeros(shape, dtype=torch.long, device=device),
            torch.zeros(shape, dtype=exact, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
            torch.full(shape, _NEVER, device=device),
            torch.full(shape, -1, device=device),
        )

    def add(self, steps: list[int], tokens: Tensor, ratios: Tensor, first: Tensor, last: Tensor) -> None:
        """A pass in which these steps ran; `ratios` is [steps phases tokens], 0 where a token was not touched."""
        rows: slice | list[int] = slice(None) if len(steps) == len(self.tokens) else steps
        self.tokens[rows] += tokens
        self.ratio[rows] += ratios.sum(2, dtype=self.ratio.dtype)
        self.largest[rows] = torch.maximum(self.largest[rows], ratios.amax(2))
        self.first[rows] = torch.minimum(self.first[rows], first)
        self.last[rows] = torch.maximum(self.last[rows], last)


@dataclass(eq=False)
class FireLog:
    """Filled while a recipe is applied; all sums stay on the model's device until they are asked for.

    A token counts once for each forward pass that touched it: once under a KV cache, at every step without one.
    A ratio is ‖Δ‖/‖x‖, what a step changed over what was there before it, at one token.
    """

    steps: Sequence[tuple[str, str, str]]  # site, kind, scope
    gates: Sequence[Gate]  # of each step
    clock: Clock
    _sums: _Sums | None = field(default=None, repr=False)
    _pass: dict[int, tuple[Tensor, Tensor | float]] = field(default_factory=dict, repr=False)
    _norms: dict[tuple, Tensor] = field(default_factory=dict, repr=False)
    _run: list[tuple[Tensor, dict[int, Tensor]]] = field(default_factory=list, repr=False)

    def note(self, step: int, before: Float[Tensor, "batch new"], change: Float[Tensor, "batch new"] | float) -> None:
        """The norms of the activation and of what a step changed in the current pass; or the change's norm per unit of
        the gate's weight, where it is the same at every token. One decode step has many notes, so they are only kept.
        """
        self._pass[step] = (before.detach(), change)

    def end_pass(self) -> None:
        """Add up the pass that is over, if there was one."""
        if not self._pass:
            return
        phase, position = self.clock.mask_of_phases(), self.clock.positions()
        ran = sorted(self._pass)
        masks = {id(self.gates[i]): self.gates[i].mask for i in ran}
        hits = {key: (mask & phase).flatten(1) for key, mask in masks.items()}
        where = position.flatten()
        seen = {
            key: (hit.sum(1), where.where(hit, _NEVER).amin(1), where.where(hit, -1).amax(1))
            for key, hit in hits.items()
        }
        tokens, first, last = (torch.stack([seen[id(self.gates[i])][n] for i in ran]) for n in range(3))
        hit = torch.stack([hits[id(self.gates[i])] for i in ran])
        before = torch.stack([self._pass[i][0].to(where.device, torch.float32) for i in ran])
        ratios = self._changes(ran, where.device) / before.clamp(min=torch.finfo(torch.float32).tiny)
        ratios = ratios.flatten(1)[:, None].where(hit, 0)
        if self._sums is None:
            self._sums = _Sums.none(len(self.steps), where.device)
        self._sums.add(ran, tokens, ratios, first, last)
        if self.clock.starts:
            self._run.clear()
        self._run.append((position, masks))
        self._pass.clear()

    def _changes(self, ran: list[int], device: torch.device) -> Tensor:
        """The norms of what each step changed, `[steps batch new]`."""
        changes = [self._pass[i][1] for i in ran]
        if all(isinstance(change, float) for change in changes):
            weights = torch.stack([self.gates[i].weight(torch.float32, device)[..., 0] for i in ran])
            key = tuple(changes)
            if key not in self._norms:  # moved to the device once
                self._norms[key] = torch.tensor(changes, device=device)[:, None, None]
            return weights.abs() * self._norms[key]
        rows = [
            change.detach().to(device, torch.float32)
            if isinstance(change, Tensor)
            else self.gates[i].weight(torch.float32, device)[..., 0].abs() * change
            for i, change in zip(ran, changes, strict=True)
        ]
        return torch.stack(rows)

    @property
    def tokens(self) -> int:
        """How many tokens were touched, over all steps."""
        return 0 if self._sums is None else int(self._sums.tokens.sum())

    def mean_ratio(self, step: int = 0) -> float:
        """The mean of ‖Δ‖/‖x‖ over all tokens that a step touched."""
        return 0.0 if self._sums is None else float(self._sums.ratio[step].sum() / self._sums.tokens[step].sum())

    def positions(self, step: int = 0) -> list[list[int]]:
        """Row by row, the absolute positions that a step touched in the last run (from an empty cache on).

        A position is a place in the row's own tokens, pads not counted.
        """
        key = id(self.gates[step])
        passes = [(position, masks.get(key, torch.zeros_like(position).bool())) for position, masks in self._run]
        rows = zip(*([p[m].tolist() for p, m in zip(*both, strict=True)] for both in passes), strict=True)
        return [[at for part in row for at in part] for row in rows]

    def table(self) -> Table:
        """By step and phase: tokens, mean and largest ratio, first and last position."""
        columns = ("step", "site", "kind", "scope", "phase", "tokens", "mean ratio", "max ratio", "first", "last")
        rows: list[tuple] = []
        for i, words in enumerate(self.steps):
            own = list(self._rows(i, words))
            rows += own or [(i, *words, "never", 0, 0.0, 0.0, "", "")]
        return Table(columns, tuple(rows), "What was touched")

    def _rows(self, step: int, words: tuple[str, str, str]) -> Iterator[tuple]:
        s = self._sums
        if s is None:
            return
        for j, phase in enumerate(PHASES if self.clock.knows_phases else ("all",)):
            if count := int(s.tokens[step, j]):
                mean, largest = float(s.ratio[step, j]) / count, float(s.largest[step, j])
                yield (step, *words, phase, count, mean, largest, int(s.first[step, j]), int(s.last[step, j]))

    def to_frame(self):
        return self.table().to_frame()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()
