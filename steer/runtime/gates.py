"""A scope at work: which tokens of the current pass it lets a step touch, and how strongly."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from probes.model.sites import SITE_NAMES, Site
from probes.rows import Remembered
from probes.thinking.phases import Clock, Ids, Phases
from steer.recipes.controller import Controller
from steer.recipes.recipe import Step
from steer.recipes.scope import Scope


@runtime_checkable
class Touched(Protocol):
    """Which tokens of the current pass a step touches."""

    @property
    def mask(self) -> Bool[Tensor, "batch new"]: ...

    @property
    def multiple(self) -> Float[Tensor, "batch new"] | None:
        """What the strength is multiplied by at each of them; None where it is 1."""
        ...


class Gate:
    """One scope during one run. Its state is constant per row, and nothing of it leaves the device.

    `markers` are those of the clock whose phases it is begun with. `mask`: the tokens of the current pass that are
    touched, none before the first.
    """

    def __init__(self, scope: Scope, markers: Sequence[tuple[Ids, ...]] = ()) -> None:
        self.scope = scope
        self.mask = torch.zeros(0, 0, dtype=torch.bool)
        self._marker = markers.index(scope.markers) if scope.after else 0
        self._phases: Phases | None = None
        self._weights: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._verdict = _Verdict() if scope.condition is not None else None
        self._multiple: Tensor | None = None
        self._listed: Tensor | None = None

    def begin(self, phases: Phases, ids: Int[Tensor, "batch new"]) -> None:
        """A new pass: where its tokens are, and what they are."""
        scope, thought = self.scope, phases.thought
        self._phases = phases
        self._weights.clear()
        self._multiple = None
        mask = phases.mask(scope.phase)
        if scope.tokens:
            mask = mask & self._is_listed(ids)
        if scope.after:
            mask = mask & (phases.marked[self._marker] >= scope.after)
        first, last = scope.window
        if first:
            mask = mask & (thought >= first)
        if last is not None:
            mask = mask & (thought < last)
        self.mask = mask
        if scope.schedule is not None:
            self._multiple = scope.schedule.at(thought)
        if scope.controller is not None and scope.controller.site is None:
            self._control(scope.controller, thought)

    def see(self, x: Float[Tensor, "batch new d_model"]) -> None:
        """The activation at the scope's gauge, in the current pass."""
        condition, controller = self.scope.condition, self.scope.controller
        if condition is not None and self._verdict is not None and self._phases is not None:
            unit = (condition.vector / condition.vector.norm()).to(x.device, torch.float32)
            projection = (x.float() @ unit).to(self.mask.device)
            above = self._verdict.above(projection, self._phases, condition.threshold)
            self.mask = self.mask & self._verdict.after_prompt & (above if condition.above else ~above)
        if controller is not None and controller.vector is not None:
            predicted = x.float() @ controller.vector.to(x.device, torch.float32) + controller.offset
            self._control(controller, predicted.to(self.mask.device))

    @property
    def multiple(self) -> Float[Tensor, "batch new"] | None:
        return self._multiple

    def weight(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "batch new 1"]:
        """The strength's multiple at each token of this pass; 0 where it is not touched."""
        if (dtype, device) not in self._weights:
            weight = self.mask if self._multiple is None else self.mask * self._multiple
            self._weights[dtype, device] = weight[..., None].to(device, dtype)
        return self._weights[dtype, device]

    def scaled(self, rows: Float[Tensor, "rows 1 1 width"]) -> Float[Tensor, "rows batch new width"]:
        """Each row by `weight`, at each token."""
        if self._multiple is None:
            return self.mask[..., None].to(rows.device) * rows
        return self.weight(rows.dtype, rows.device) * rows

    def _control(self, controller: Controller, length: Tensor) -> None:
        multiple = controller.at(length)
        self._multiple = multiple if self._multiple is None else self._multiple * multiple

    def _is_listed(self, ids: Tensor) -> Tensor:
        if self._listed is None or self._listed.device != ids.device:
            listed = torch.zeros(max(self.scope.tokens) + 1, dtype=torch.bool)
            listed[list(self.scope.tokens)] = True
            self._listed = listed.to(ids.device)
        return self._listed[ids.clamp(max=len(self._listed) - 1)] & (ids < len(self._listed))


def clock_and_gates(
    model: PreTrainedModel, steps: Sequence[Step], *, needed: bool = False
) -> tuple[Clock, dict[Scope, Gate]]:
    """What tells where the tokens of a run are, and a gate for each scope of the steps. Phases are needed where a scope
    asks for one, or where `needed`. Raises ValueError where a scope reads a site that is computed after the edit it
    decides on, or asks what the model's tokens cannot tell."""
    scopes = list(dict.fromkeys(step.scope for step in steps))
    needed = needed or any(scope.phase != "all" or scope.condition is not None for scope in scopes)
    clock = Clock.of(model, needed=needed, markers=list(dict.fromkeys(s.markers for s in scopes if s.markers)))
    for step in steps:
        _check_order(step, clock)
    return clock, {scope: Gate(scope, clock.markers) for scope in scopes}


def _check_order(step: Step, clock: Clock) -> None:
    scope, site = step.scope, step.intervention.site
    if scope.gauge is not None and not precedes(scope.gauge, site):
        raise ValueError(f"The scope of {site} reads {scope.gauge}, which is computed after it: read an earlier site.")
    if scope.condition is not None and not clock.delimiters.turn:
        raise ValueError(
            "A condition is judged at the end of the prompt, but the chat template writes no header before the model's "
            "turn, so that end cannot be told. Set the tokenizer's chat template, or give Delimiters(turn=...)."
        )


class _Verdict:
    """The mean projection of each row's prompt, as it stood at the end of the last header."""

    def __init__(self) -> None:
        self.after_prompt = torch.zeros(0, dtype=torch.bool)
        none = torch.zeros(0)
        self._memory = Remembered((none, none, none, none.bool()))

    def above(self, projection: Tensor, phases: Phases, threshold: float) -> Tensor:
        """Whether each token's row is above; `after_prompt` then tells the tokens from the header's end on."""
        real, opens = phases.real, phases.opens
        if phases.starts:
            zero = projection.new_zeros(len(projection))
            self._memory.begin(phases.rows, (zero, zero, zero, zero.bool()))
        else:
            self._memory.turn(phases.rows)
        sums, counts, means, decided = self._memory.state
        total = projection.where(real, 0).cumsum(1) + sums[:, None]
        count = real.cumsum(1) + counts[:, None]
        place = torch.arange(real.shape[1], device=real.device).expand_as(real)
        header = place.where(opens, -1).cummax(1).values
        mean = (total / count.clamp(min=1)).gather(1, header.clamp(min=0)).where(header >= 0, means[:, None])
        self.after_prompt = (header >= 0) | decided[:, None]
        self._memory.state = (total[:, -1], count[:, -1], mean[:, -1], self.after_prompt[:, -1])
        return mean > threshold


def precedes(gauge: Site, edit: Site) -> bool:
    """Is `gauge` computed before `edit` is changed?"""
    return (gauge.layer, SITE_NAMES.index(gauge.name)) <= (edit.layer, SITE_NAMES.index(edit.name))
