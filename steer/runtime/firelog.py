"""What an applied recipe really touched: by step and phase, how many tokens, where, and how hard."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.tables import Shown, Table
from probes.thinking.phases import PHASES, Phases
from steer.runtime.gates import Touched
from steer.runtime.noted import Norms, Noted

_NEVER = 2**62
_TOGETHER = 32  # passes of one shape that are added up together


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


@dataclass(frozen=True, eq=False)
class _Behind:
    """The steps behind one gate in one pass, the tokens that it let them touch, and by how much of their strength."""

    steps: tuple[int, ...]
    mask: Bool[Tensor, "batch new"]
    multiple: Float[Tensor, "batch new"] | None


@dataclass(frozen=True, eq=False)
class _Pass:
    """A pass that is over, and by step the norms of what it met and of what it changed."""

    phases: Phases
    behind: dict[Touched, _Behind]
    norms: Norms

    @property
    def kind(self) -> tuple[Any, ...]:
        """Passes of one kind are added up together."""
        ran = [(id(gate), part.steps, part.multiple is None) for gate, part in self.behind.items()]
        return self.phases.real.shape, ran


def _norms_of(
    passes: Sequence[_Pass], steps: Sequence[int], which: int, device: torch.device
) -> Float[Tensor, "steps tokens"]:
    """The norms of each step, pass after pass; `which` says of what it met, or of what it changed."""
    found = [p.norms[step][which] for step in steps for p in passes]
    rows = [norms.to(device, torch.float32) for norms in found if isinstance(norms, Tensor)]
    return torch.stack(rows).view(len(steps), -1)


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
    _total: _Sums | None = field(default=None, repr=False)
    _noted: Noted = field(default_factory=Noted, repr=False)
    _over: list[_Pass] = field(default_factory=list, repr=False)  # passes that are to be added up
    _run: list[tuple[Phases, dict[int, Tensor]]] = field(default_factory=list, repr=False)

    def note(self, step: int, x: Float[Tensor, "batch new width"], change: float | Float[Tensor, "..."]) -> None:
        """A step met `x` in the current pass, and made `change` of it; or adds one vector of this norm.

        One decode step has many notes, so they are only kept.
        """
        self._noted.note(step, x, change)

    def note_norms(self, step: int, before: Float[Tensor, "batch new"], change: Float[Tensor, "batch new"]) -> None:
        """As `note`, the norms known."""
        self._noted.note_norms(step, before, change)

    def begin(self, phases: Phases) -> None:
        """A new pass; the one before it is over."""
        self.end_pass()
        self._phases = phases

    def end_pass(self) -> None:
        """Keep what the pass that is over touched, if there was one."""
        now, norms = self._phases, self._noted.take()
        if not norms or now is None:
            return
        by_gate = {gate: ran for gate, steps in self._by_gate.items() if (ran := [s for s in steps if s in norms])}
        behind = {gate: _Behind(tuple(ran), gate.mask, gate.multiple) for gate, ran in by_gate.items()}
        done = _Pass(now, behind, norms)
        if self._over and self._over[-1].kind != done.kind:
            self._add_up()
        self._over.append(done)
        if len(self._over) == _TOGETHER or now.real.shape[1] > 1:
            self._add_up()
        if now.starts and self._run and (now.rows is None or _run_of(self._run[-1][0]) is not now.rows.run):
            self._run.clear()
        self._run.append((now, {id(gate): part.mask for gate, part in behind.items()}))

    @cached_property
    def _by_gate(self) -> dict[Touched, list[int]]:
        return {gate: [i for i, own in enumerate(self.gates) if own is gate] for gate in self.gates}

    @property
    def _sums(self) -> _Sums | None:
        self._add_up()
        return self._total

    def _add_up(self) -> None:
        """The passes that wait, whose rows are then as tokens of one pass."""
        passes, self._over = self._over, []
        if not passes:
            return
        phase, position = (torch.stack([getattr(p.phases, n) for p in passes]).flatten() for n in ("phase", "position"))
        in_phase = torch.stack([phase == i for i in range(len(PHASES))])
        if self._total is None:
            self._total = _Sums.none(len(self.steps), position.device)
        for gate, first in passes[0].behind.items():
            parts = [p.behind[gate] for p in passes]
            mask = torch.stack([part.mask.to(position.device) for part in parts]).flatten()
            steps, hit = list(first.steps), mask & in_phase
            before = _norms_of(passes, steps, 0, position.device)
            ratios = self._changes(passes, parts, before) / before.clamp(min=torch.finfo(torch.float32).tiny)
            start, stop = position.where(hit, _NEVER).amin(1), position.where(hit, -1).amax(1)
            self._total.add(steps, hit.sum(1), ratios[:, None].where(hit, 0), start, stop)

    def _changes(
        self, passes: list[_Pass], parts: list[_Behind], before: Float[Tensor, "steps tokens"]
    ) -> Float[Tensor, "steps tokens"]:
        """The norms of what each step changed; of one that adds a vector, by the multiples of its strength."""
        multiples = [part.multiple.to(before.device) for part in parts if part.multiple is not None]
        weight = torch.stack(multiples).flatten().float().abs() if multiples else torch.ones_like(before[0])
        own = [passes[0].norms[step][1] for step in parts[0].steps]
        rows = [
            weight * change if isinstance(change, float) else _norms_of(passes, [step], 1, before.device)[0]
            for step, change in zip(parts[0].steps, own, strict=True)
        ]
        return torch.stack(rows)

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
