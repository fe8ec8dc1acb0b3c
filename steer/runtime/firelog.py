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
class _Pass:
    """A pass that is over: what its steps changed, and of each gate which tokens it let them touch, by how much."""

    phases: Phases
    norms: list[Norms]
    gates: dict[int, tuple[Bool[Tensor, "batch new"], Float[Tensor, "batch new"] | None]]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Passes of one kind are added up together."""
        ran = [(part.gate, part.steps, part.adds, self.gates[part.gate][1] is None) for part in self.norms]
        return self.phases.real.shape, ran


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
    _over: list[_Pass] = field(default_factory=list, repr=False)  # passes that are to be added up
    _run: list[tuple[Phases, dict[int, Tensor]]] = field(default_factory=list, repr=False)
    _kept: list[_Pass] | None = field(default=None, repr=False)  # passes since `keep`

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
        behind = {part.gate: (self.gates[part.gate].mask, self.gates[part.gate].multiple) for part in norms}
        done = _Pass(now, norms, behind)
        if self._over and self._over[-1].kind != done.kind:
            self._add_up()
        self._over.append(done)
        if self._kept is not None:
            self._kept.append(done)
        if len(self._over) == _TOGETHER or now.real.shape[1] > 1:
            self._add_up()
        if now.starts and self._run and (now.rows is None or _run_of(self._run[-1][0]) is not now.rows.run):
            self._run.clear()
        self._run.append((now, {gate: mask for gate, (mask, _) in behind.items()}))

    def keep(self) -> None:
        """From now on keep what every pass touched, token by token, for `ratios`: memory grows with the tokens."""
        self._kept = []

    def ratios(self, n: int) -> Float[Tensor, "steps n"]:
        """Of the passes of one row since `keep`: ‖Δ‖/‖x‖ of each step at the first `n` positions, NaN where it
        touched nothing. Raises ValueError where nothing was kept, and where a pass had several rows.

        >>> from probes import Site, generate, load
        >>> from steer import Recipe, Scale, applied
        >>> model = load("organism")
        >>> with applied(model, Recipe.of(model, [Scale(Site(2, "mlp_out"), 0.5)], scope="answer")) as log:
        ...     log.keep()
        ...     (completion,) = generate(model, ["a 3 b +4"])
        >>> log.ratios(len(completion.all_ids))[0].round(decimals=2).tolist()[-3:]
        [nan, 0.5, 0.5]
        """
        self.end_pass()
        if self._kept is None:
            raise ValueError("What each token was changed by is not kept, unless `keep()` was called before the run.")
        found = torch.full((len(self.steps), n), torch.nan)
        for done in self._kept:
            if len(done.phases.position) > 1:
                raise ValueError("Ratios are told of one row, but several were run at once: run one completion alone.")
            for steps, mask, ratios in _touched([done], done.phases.position.device):
                position = done.phases.position[0]
                at = mask & (position < n)
                found[list(steps), position[at].cpu()[:, None]] = ratios[:, at].T.cpu()
        return found

    @cached_property
    def _first(self) -> list[int]:
        """Of each step, the first that is behind the same gate, which stands for it."""
        return [next(i for i, other in enumerate(self.gates) if other is own) for own in self.gates]

    @cached_property
    def _noted(self) -> Noted:
        return Noted(self._first)

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
        device, in_phase = position.device, torch.stack([phase == i for i in range(len(PHASES))])
        if self._total is None:
            self._total = _Sums.none(len(self.steps), device)
        for steps, mask, ratios in _touched(passes, device):
            hit = mask & in_phase
            start, stop = position.where(hit, _NEVER).amin(1), position.where(hit, -1).amax(1)
            self._total.add(list(steps), hit.sum(1), ratios[:, None].where(hit, 0), start, stop)

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
        key, found = self._first[step], dict[int, list[int]]()
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


def _touched(
    passes: Sequence[_Pass], device: torch.device
) -> Iterator[tuple[tuple[int, ...], Bool[Tensor, " tokens"], Float[Tensor, "steps tokens"]]]:
    """Of passes of one kind, gate by gate: its steps, which tokens they touched, and each step's ‖Δ‖/‖x‖ at all."""
    for part, first in enumerate(passes[0].norms):
        norms, gates = [p.norms[part] for p in passes], [p.gates[first.gate] for p in passes]
        before, change = (_side_by_side(norms, name, device) for name in ("before", "change"))
        if first.adds:
            multiples = [multiple.flatten() for _, multiple in gates if multiple is not None]
            change = change[:, :1] * (torch.cat(multiples).to(device).float().abs() if multiples else 1.0)
        mask = torch.stack([mask.to(device) for mask, _ in gates]).flatten()
        yield first.steps, mask, change / before.clamp(min=torch.finfo(torch.float32).tiny)


def _side_by_side(norms: Sequence[Norms], name: str, device: torch.device) -> Float[Tensor, "steps tokens"]:
    """Pass after pass."""
    return torch.cat([getattr(part, name).to(device, torch.float32) for part in norms], dim=1)


def _run_of(phases: Phases) -> object:
    return None if phases.rows is None else phases.rows.run
