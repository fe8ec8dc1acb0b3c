"""A scope at work: which tokens of the current pass it lets a step touch, and how strongly."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.model.sites import SITE_NAMES, Site, SiteName
from probes.thinking.phases import Clock
from steer.recipes.scope import Scope

# In which order a block computes its sites; resid_pre comes first.
_ORDER: tuple[SiteName, ...] = (
    "resid_pre", "attn_in", "z", "result", "attn_out", "resid_mid", "mlp_in", "routing", "mlp_out", "resid_post",
)  # fmt: skip
assert set(_ORDER) == set(SITE_NAMES)


class Touched(ABC):
    """Which tokens of the current pass a step touches."""

    @property
    @abstractmethod
    def mask(self) -> Bool[Tensor, "batch new"]: ...

    @abstractmethod
    def weight(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "batch new 1"]:
        """The strength's multiple at each token of this pass; 0 where it is not touched."""


class Gate(Touched):
    """One scope during one run. Its state is constant per row, and nothing of it leaves the device."""

    def __init__(self, scope: Scope, clock: Clock) -> None:
        self.scope, self.clock = scope, clock
        self._mask: Tensor | None = None
        self._weights: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._verdict = _Verdict() if scope.condition is not None else None
        self._multiple: Tensor | None = None
        self._listed: Tensor | None = None

    def begin(self, ids: Int[Tensor, "batch new"]) -> None:
        """A new pass, which the clock has taken in."""
        scope, clock = self.scope, self.clock
        self._weights.clear()
        self._multiple = None
        mask = clock.mask(scope.phase)
        if scope.tokens:
            mask = mask & self._is_listed(ids)
        if scope.after:
            mask = mask & (clock.marked[clock.markers.index(scope.markers)] >= scope.after)
        first, last = scope.window
        thought = clock.thought
        assert thought is not None
        if first:
            mask = mask & (thought >= first)
        if last is not None:
            mask = mask & (thought < last)
        self._mask = mask
        if scope.schedule is not None:
            self._multiple = scope.schedule.at(thought)
        if scope.controller is not None and scope.controller.site is None:
            self._control(thought)

    def see(self, x: Float[Tensor, "batch new d_model"]) -> None:
        """The activation at the scope's gauge, in the current pass."""
        condition, controller = self.scope.condition, self.scope.controller
        assert self._mask is not None
        if condition is not None and self._verdict is not None:
            unit = (condition.vector / condition.vector.norm()).to(x.device, torch.float32)
            projection = (x.float() @ unit).to(self._mask.device)
            above = self._verdict.above(projection, self.clock, condition.threshold)
            self._mask = self._mask & self._verdict.after_prompt & (above if condition.above else ~above)
        if controller is not None and controller.vector is not None:
            predicted = x.float() @ controller.vector.to(x.device, torch.float32) + controller.offset
            self._control(predicted.to(self._mask.device))

    @property
    def mask(self) -> Bool[Tensor, "batch new"]:
        """The tokens of this pass that are touched."""
        assert self._mask is not None
        return self._mask

    def weight(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "batch new 1"]:
        if (dtype, device) not in self._weights:
            weight = self.mask if self._multiple is None else self.mask * self._multiple
            self._weights[dtype, device] = weight[..., None].to(device, dtype)
        return self._weights[dtype, device]

    def _control(self, length: Tensor) -> None:
        assert self.scope.controller is not None
        multiple = self.scope.controller.at(length)
        self._multiple = multiple if self._multiple is None else self._multiple * multiple

    def _is_listed(self, ids: Tensor) -> Tensor:
        if self._listed is None or self._listed.device != ids.device:
            listed = torch.zeros(max(self.scope.tokens) + 1, dtype=torch.bool)
            listed[list(self.scope.tokens)] = True
            self._listed = listed.to(ids.device)
        return self._listed[ids.clamp(max=len(self._listed) - 1)] & (ids < len(self._listed))


class _Verdict:
    """The mean projection of each row's prompt, as it stood at the end of the last header."""

    def __init__(self) -> None:
        self.after_prompt = torch.zeros(0, dtype=torch.bool)
        self._sum = self._count = self._mean = torch.zeros(0)
        self._decided = torch.zeros(0, dtype=torch.bool)

    def above(self, projection: Tensor, clock: Clock, threshold: float) -> Tensor:
        """Whether each token's row is above; `after_prompt` then tells the tokens from the header's end on."""
        real, opens = clock.real, clock.opens
        assert opens is not None
        if clock.starts:
            zero = projection.new_zeros(len(projection))
            self._sum, self._count, self._mean, self._decided = zero, zero, zero, zero.bool()
        total = projection.where(real, 0).cumsum(1) + self._sum[:, None]
        count = real.cumsum(1) + self._count[:, None]
        place = torch.arange(real.shape[1], device=real.device).expand_as(real)
        header = place.where(opens, -1).cummax(1).values
        mean = (total / count.clamp(min=1)).gather(1, header.clamp(min=0)).where(header >= 0, self._mean[:, None])
        self.after_prompt = (header >= 0) | self._decided[:, None]
        self._sum, self._count = total[:, -1], count[:, -1]
        self._mean, self._decided = mean[:, -1], self.after_prompt[:, -1]
        return mean > threshold


def precedes(gauge: Site, edit: Site) -> bool:
    """Is `gauge` computed before `edit` is changed?"""
    return (gauge.layer, _ORDER.index(gauge.name)) <= (edit.layer, _ORDER.index(edit.name))
