"""What an applied recipe really touched: by step and phase, how many tokens, where, and how hard."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.tables import Shown, Table
from probes.thinking.phases import PHASES, Phases
from steer.runtime.gates import Touched

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


@dataclass(eq=False, repr=False)
class FireLog(Shown):
    """Filled while a recipe is applied; all sums stay on the model's device until they are asked for.

    A token counts once for each forward pass that touched it: once under a KV cache, at every step without one.
    A ratio is ‖Δ‖/‖x‖, what a step changed over what was there before it, at one token.

    >>> import torch
    >>> from probes import Site, generate, load
    >>> from steer import Recipe, Scale, applied
    >>> model = load("organism")
    >>> with applied(model, Recipe.of(model, [Scale(Site(2, "mlp_out"), 0.5)], scope="thinking")) as log:
    ...     completion = generate(model, ["a 3 b +4 c *7"])[0]
    >>> log.tokens, log.mean_ratio(), log.positions()
    (10, 0.5, [[8, 9, 10, 11, 12, 13, 14, 15, 16, 17]])
    """

    steps: Sequence[tuple[str, str, str]]  # site, kind, scope
    gates: Sequence[Touched]  # of each step
    knows_phases: bool = True
    _phases: Phases | None = field(default=None, repr=False)
    _sums: _Sums | None = field(default=None, repr=False)
    _pass: dict[int, tuple[Tensor, Tensor | float]] = field(default_factory=dict, repr=False)
    _norms: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, repr=False)
    _run: list[tuple[Phases, dict[int, Tensor]]] = field(default_factory=list, repr=False)

    def note(self, step: int, before: Float[Tensor, "batch new"], change: Float[Tensor, "batch new"] | float) -> None:
        """The norms of the activation and of what a step changed in the current pass; or the change's norm per unit of
        the gate's weight, where it is the same at every token. One decode step has many notes, so they are only kept.
        """
        self._pass[step] = (before.detach(), change)

    def begin(self, phases: Phases) -> None:
        """A new pass; the one before it is over."""
        self.end_pass()
        self._phases = phases

    def end_pass(self) -> None:
        """Add up the pass that is over, if there was one."""
        now = self._phases
        if not self._pass or now is None:
            return
        masks_of_phases, position = now.masks(), now.position
        if self._sums is None:
            self._sums = _Sums.none(len(self.steps), position.device)
        masks = {}
        for gate, steps in self._by_gate.items():
            if ran := [step for step in steps if step in self._pass]:
                masks[id(gate)] = gate.mask
                self._add(gate, ran, (gate.mask & masks_of_phases).flatten(1), position.flatten())
        if now.starts and self._run and (now.rows is None or _run_of(self._run[-1][0]) is not now.rows.run):
            self._run.clear()
        self._run.append((now, masks))
        self._pass.clear()

    @cached_property
    def _by_gate(self) -> dict[Touched, list[int]]:
        return {gate: [i for i, own in enumerate(self.gates) if own is gate] for gate in self.gates}

    def _add(self, gate: Touched, ran: list[int], hit: Tensor, position: Tensor) -> None:
        """The steps behind one gate, which touch the same tokens; `hit` is [phases tokens]."""
        assert self._sums is not None
        before = torch.stack([self._pass[i][0].to(position.device, torch.float32) for i in ran]).flatten(1)
        ratios = self._changes(gate, ran, position.device) / before.clamp(min=torch.finfo(torch.float32).tiny)
        first, last = position.where(hit, _NEVER).amin(1), position.where(hit, -1).amax(1)
        self._sums.add(ran, hit.sum(1), ratios[:, None].where(hit, 0), first, last)

    def _changes(self, gate: Touched, ran: list[int], device: torch.device) -> Float[Tensor, "steps tokens"]:
        """The norms of what each step changed."""
        changes = [self._pass[i][1] for i in ran]
        if all(isinstance(change, float) for change in changes):
            key = tuple(changes)
            if key not in self._norms:  # moved to the device once
                self._norms[key] = torch.tensor(changes, device=device)[:, None]
            return gate.weight(torch.float32, device).flatten().abs() * self._norms[key]
        weight = gate.weight(torch.float32, device)[..., 0].abs()
        rows = [c.detach().to(device, torch.float32) if isinstance(c, Tensor) else weight * c for c in changes]
        return torch.stack(rows).flatten(1)

    @property
    def ran(self) -> bool:
        """Did the model run at all, while the recipe was applied?"""
        return self._phases is not None

    @property
    def tokens(self) -> int:
        """How many tokens were touched, over all steps."""
        return 0 if self._sums is None else int(self._sums.tokens.sum())

    def mean_ratio(self, step: int = 0) -> float:
        """The mean of ‖Δ‖/‖x‖ over all tokens that a step touched."""
        return 0.0 if self._sums is None else float(self._sums.ratio[step].sum() / self._sums.tokens[step].sum())

    def positions(self, step: int = 0) -> list[list[int]]:
        """Row by row, the absolute positions that a step touched in the last run.

        A run is a call of `probes.generate`, its rows in the order of prompts and samples; else what follows an empty
        cache. A position is a place in the row's own tokens, pads not counted.
        """
        key, found = id(self.gates[step]), dict[int, list[int]]()
        for now, masks in self._run:
            mask = masks.get(key, torch.zeros_like(now.real))
            numbers = range(len(mask)) if now.rows is None else now.rows.numbers
            for number, own, hit in zip(numbers, now.position, mask, strict=True):
                found.setdefault(number, []).extend(own[hit].tolist())
        return [found[number] for number in sorted(found)]

    def table(self) -> Table:
        """By step and phase: tokens, mean and largest ratio, first and last position."""
        columns = ("step", "site", "kind", "scope", "phase", "tokens", "mean ratio", "max ratio", "first", "last")
        rows: list[tuple[Any, ...]] = []
        for i, words in enumerate(self.steps):
            own = list(self._rows(i, words))
            rows += own or [(i, *words, "never", 0, 0.0, 0.0, "", "")]
        return Table(columns, tuple(rows), "What was touched")

    def _rows(self, step: int, words: tuple[str, str, str]) -> Iterator[tuple[Any, ...]]:
        s = self._sums
        if s is None:
            return
        for j, phase in enumerate(PHASES if self.knows_phases else ("all",)):
            if count := int(s.tokens[step, j]):
                mean, largest = float(s.ratio[step, j]) / count, float(s.largest[step, j])
                yield (step, *words, phase, count, mean, largest, int(s.first[step, j]), int(s.last[step, j]))


def _run_of(phases: Phases) -> object:
    return None if phases.rows is None else phases.rows.run
