"""How the strength varies over the thinking: by a schedule, or by a controller with a set-point."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from probes.directions.length_probe import LengthProbe
from probes.directions.vector import check_number, check_row
from probes.model.sites import Site
from probes.tables import Brief
from probes.words import checked

Shape = Literal["linear", "cosine", "step"]


@checked
@dataclass(frozen=True)
class Schedule:
    """The strength's multiple as a function of the thinking position t: `start` at 0, `end` from t = `over` on.

    With u = min(t / over, 1): *linear* start + (end - start) u, *cosine* end + (start - end) (1 + cos πu) / 2,
    *step* start before `over`, then end. Raises ValueError where `over`, in tokens, is not above 0.

    >>> import torch
    >>> from steer import Schedule
    >>> Schedule("linear", start=1.0, end=0.0, over=100).at(torch.tensor([0, 50, 200]))
    tensor([1.0000, 0.5000, 0.0000])
    """

    shape: Shape
    start: float
    end: float
    over: float

    def __post_init__(self) -> None:
        if not self.over > 0:
            raise ValueError(f"A schedule runs over a number of tokens above 0, but got over={self.over}.")
        for name in ("start", "end", "over"):
            check_number(getattr(self, name), name, "The schedule")

    def at(self, thought: Tensor) -> Float[Tensor, "*batch"]:
        """The multiple at thinking positions of any shape."""
        u = (thought.float() / self.over).clamp(0, 1)
        match self.shape:
            case "linear":
                return self.start + (self.end - self.start) * u
            case "cosine":
                return self.end + (self.start - self.end) * (1 + torch.cos(torch.pi * u)) / 2
            case _:
                return torch.where(u < 1, float(self.start), float(self.end))


@dataclass(frozen=True, eq=False, repr=False)
class Controller(Brief):
    """The strength's multiple is clamp(gain (1 - L / set_point), -1, 1): full while the thinking is far from its
    set-point, none at it, negative past it.

    L is the number of thinking tokens so far or, with `vector`, what a linear probe predicts: x.vector + offset at
    `site`. The intervention's own direction must be the one that lengthens. Raises ValueError where the set-point is
    not above 0 tokens, or only one of site and vector is given.

    >>> import torch
    >>> from steer import Controller
    >>> Controller(set_point=100).at(torch.tensor([0, 90, 100, 110, 300]))
    tensor([ 1.0000,  0.4000,  0.0000, -0.4000, -1.0000])
    """

    set_point: float
    gain: float = 4.0
    site: Site | None = None
    vector: Float[Tensor, " d_model"] | None = None
    offset: float = 0.0

    @classmethod
    def of(cls, probe: LengthProbe, set_point: float, *, gain: float = 1.0) -> "Controller":
        """One that predicts. With the scope's window (0, 1) it decides once, at the start of the thinking."""
        return cls(set_point, gain, probe.site, probe.vector, probe.offset)

    def __post_init__(self) -> None:
        if not self.set_point > 0:
            raise ValueError(f"A controller needs a set-point above 0 thinking tokens, but got {self.set_point}.")
        if (self.site is None) != (self.vector is None):
            raise ValueError("A controller that predicts needs both a site and a vector; one that counts, neither.")
        for name in ("set_point", "gain", "offset"):
            check_number(getattr(self, name), name, "The controller")
        if self.vector is not None:
            check_row(self.vector, f"the controller at {self.site}")

    def at(self, length: Tensor) -> Float[Tensor, "*batch"]:
        """The multiple at lengths of any shape, in tokens."""
        return (self.gain * (1 - length.float() / self.set_point)).clamp(-1, 1)
