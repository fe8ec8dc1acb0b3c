"""What to do to an activation. A linear intervention has an `affine` form, and that form can be folded."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.directions.direction import Direction
from probes.directions.provenance import Provenance
from probes.directions.vector import check_number, check_row
from probes.model.architectures import tap_of, width_of
from probes.model.sites import Site
from probes.tables import Brief
from probes.words import checked
from steer.interventions.affine import Affine, widened

Units = Literal["stream", "raw"]


@runtime_checkable
class Intervention(Protocol):
    """A change to the activation at one site. `vector` is its tensor, if it has one, and `birth` where that came from;
    `strength` is its size. One whose change is linear has `affine` too, and so folds into weights.

    >>> from probes import Site
    >>> from steer.interventions import Intervention, Scale
    >>> isinstance(Scale(Site(1, "attn_out"), strength=0.5), Intervention)
    True
    """

    kind: ClassVar[str]

    @property
    def site(self) -> Site: ...
    @property
    def vector(self) -> Float[Tensor, " width"] | None: ...
    @property
    def strength(self) -> float: ...
    @property
    def birth(self) -> Provenance | None: ...

    def check(self, model: PreTrainedModel) -> None: ...

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]: ...


@dataclass(frozen=True, eq=False, repr=False)
class Add(Brief):
    """x + strength * vector: activation addition (Turner et al. 2023). Added in the model's dtype.

    Raises ValueError where the strength, or an entry of the vector, is not finite.

    >>> import torch
    >>> from probes import Site
    >>> from steer import Add
    >>> add = Add(Site(2, "resid_post"), torch.tensor([1.0, 0.0]), strength=3.0)
    >>> add(torch.tensor([1.0, 1.0]))
    tensor([4., 1.])
    """

    kind: ClassVar[str] = "add"
    site: Site
    vector: Float[Tensor, " width"]
    strength: float = 1.0
    birth: Provenance | None = None

    def __post_init__(self) -> None:
        _check(self.kind, self.site, self.vector, self.strength)

    @classmethod
    @checked
    def of(cls, direction: Direction, strength: float, *, units: Units = "stream") -> "Add":
        """Along a direction, at its site. In units `stream` a strength of 1 adds a vector as long as the stream's mean
        norm there; in `raw` ones, the direction as it is."""
        return cls(direction.site, _in_units(direction, units), strength, direction.provenance)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the model has no such site, or the vector does not fit it."""
        check_vector(model, self.site, self.vector, zero=True)

    def affine(self, width: int) -> Affine:
        """The same change in its linear form, with a rank of 0."""
        rank_0 = self.vector.new_zeros(width, 0)
        return Affine(rank_0, rank_0.T, self.strength * self.vector)

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return torch.add(x, self.vector.to(x.dtype), alpha=self.strength)


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Brief):
    """x + strength * (target - x.v̂) v̂, with v̂ along vector: directional ablation (Arditi et al. 2024).

    With strength 1 the projection on v̂ becomes `target`, in activation units: 0 removes it, another value sets it.
    Raises ValueError where a number, or an entry of the vector, is not finite.

    >>> import torch
    >>> from probes import Site
    >>> from steer import Ablate
    >>> site, vector, x = Site(2, "resid_post"), torch.tensor([2.0, 0.0]), torch.tensor([3.0, 1.0])
    >>> Ablate(site, vector)(x)
    tensor([0., 1.])
    >>> Ablate(site, vector, target=7.0)(x)
    tensor([7., 1.])
    """

    kind: ClassVar[str] = "ablate"
    site: Site
    vector: Float[Tensor, " width"]
    strength: float = 1.0
    target: float = 0.0
    birth: Provenance | None = None

    def __post_init__(self) -> None:
        _check(self.kind, self.site, self.vector, self.strength, target=self.target)

    @classmethod
    def of(cls, direction: Direction, strength: float = 1.0, *, target: float = 0.0) -> "Ablate":
        """Of a direction, at its site."""
        return cls(direction.site, direction.vector, strength, target, direction.provenance)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the model has no such site, or the vector does not fit it or is zero."""
        check_vector(model, self.site, self.vector)

    def affine(self, width: int) -> Affine:
        """The same change in its linear form, with a rank of 1."""
        unit = _unit(self.vector)
        assert len(unit) == width
        return Affine(-self.strength * unit[:, None], unit[None, :], self.strength * self.target * unit)

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.affine(x.shape[-1])(x)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Brief):
    """strength * x: of a head's z or write, or of what a block adds. 0 knocks it out, 1 changes nothing.

    Raises ValueError where the strength is not finite.

    >>> import torch
    >>> from probes import Site
    >>> from steer import Scale
    >>> Scale(Site(1, "z", head=3), strength=0.5)(torch.tensor([3.0, 1.0]))
    tensor([1.5000, 0.5000])
    """

    kind: ClassVar[str] = "scale"
    vector: ClassVar[None] = None
    birth: ClassVar[None] = None
    site: Site
    strength: float = 0.0

    def __post_init__(self) -> None:
        _check(self.kind, self.site, None, self.strength)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the model has no such site."""
        tap_of(model, self.site)

    def affine(self, width: int) -> Affine:
        """The same change in its linear form, with a rank of `width`."""
        identity = torch.eye(width)
        return Affine((self.strength - 1) * identity, identity, torch.zeros(width))

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return x * self.strength


@dataclass(frozen=True, eq=False, repr=False)
class Clamp(Brief):
    """x + strength * (clamp(x.v̂, low, high) - x.v̂) v̂: the projection on v̂ is kept within bounds. Not linear.

    The bounds are in activation units. Raises ValueError where low is above high, or a number is not finite.

    >>> import torch
    >>> from probes import Site
    >>> from steer import Clamp
    >>> Clamp(Site(2, "resid_post"), torch.tensor([2.0, 0.0]), high=1.0)(torch.tensor([3.0, 5.0]))
    tensor([1., 5.])
    """

    kind: ClassVar[str] = "clamp"
    site: Site
    vector: Float[Tensor, " width"]
    strength: float = 1.0
    low: float = float("-inf")
    high: float = float("inf")
    birth: Provenance | None = None

    @classmethod
    def of(
        cls, direction: Direction, strength: float = 1.0, *, low: float = float("-inf"), high: float = float("inf")
    ) -> "Clamp":
        """Along a direction, at its site; bounds are in activation units."""
        return cls(direction.site, direction.vector, strength, low, high, direction.provenance)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the model has no such site, or the vector does not fit it or is zero."""
        check_vector(model, self.site, self.vector)

    def __post_init__(self) -> None:
        _check(self.kind, self.site, self.vector, self.strength)
        if not self.low <= self.high:
            raise ValueError(f"A clamp needs low <= high, but got low={self.low} and high={self.high}.")

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        wide = widened(x)
        unit = _unit(self.vector).to(wide.dtype)
        projection = wide @ unit
        change = self.strength * (projection.clamp(self.low, self.high) - projection)
        return (wide + change[..., None] * unit).to(x.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Rotate(Brief):
    """(x + strength * vector) * ‖x‖ / ‖x + strength * vector‖: turned towards vector, as long as before.

    An Add that keeps the norm, as `normalize` does in Representation Engineering (Zou et al. 2023). Not linear.
    Raises ValueError where the strength, or an entry of the vector, is not finite.

    >>> import torch
    >>> from probes import Site
    >>> from steer import Rotate
    >>> Rotate(Site(2, "resid_post"), torch.tensor([0.0, 1.0]), strength=5.0)(torch.tensor([5.0, 0.0]))
    tensor([3.5355, 3.5355])
    """

    kind: ClassVar[str] = "rotate"
    site: Site
    vector: Float[Tensor, " width"]
    strength: float = 1.0
    birth: Provenance | None = None

    @classmethod
    @checked
    def of(cls, direction: Direction, strength: float, *, units: Units = "stream") -> "Rotate":
        """Towards a direction, at its site; units as for `Add.of`."""
        return cls(direction.site, _in_units(direction, units), strength, direction.provenance)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the model has no such site, or the vector does not fit it or is zero."""
        check_vector(model, self.site, self.vector)

    def __post_init__(self) -> None:
        _check(self.kind, self.site, self.vector, self.strength)

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        wide = widened(x)
        new = wide + self.strength * self.vector.to(wide.dtype)
        length = new.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        out: Tensor = (new * (wide.norm(dim=-1, keepdim=True) / length)).to(x.dtype)
        return out


T = TypeVar("T")


def with_fields(intervention: T, **changes: Any) -> T:
    """The same with other values in some fields: each kind is a frozen dataclass, which a Protocol cannot say."""
    return cast("T", replace(cast("Any", intervention), **changes))


def placed(intervention: Intervention, device: torch.device) -> Intervention:
    """The same intervention with its tensors on `device`, so that no step of a run has to move them."""
    moved = {name: value.to(device) for name, value in vars(intervention).items() if isinstance(value, Tensor)}
    return with_fields(intervention, **moved)


def check_vector(model: PreTrainedModel, site: Site, vector: Tensor, *, zero: bool = False) -> None:
    """Raise ValueError where the model has no such site, the vector is of another width (it would be stretched without
    a word), or is zero, and so has no direction, unless `zero` lets it be."""
    tap_of(model, site)
    width = width_of(model, site)
    if len(vector) != width:
        raise ValueError(f"The vector for {site} has {len(vector)} entries, but the activation there has {width}.")
    if not zero and not vector.any():
        raise ValueError(f"The vector for {site} is zero, so there is no direction to project on.")


def _in_units(direction: Direction, units: Units) -> Float[Tensor, " d_model"]:
    return direction.unit * direction.stream_norm if units == "stream" else direction.vector


def _unit(vector: Tensor) -> Tensor:
    out: Tensor = vector.float() / vector.float().norm()
    return out


def _check(kind: str, site: Site, vector: Tensor | None, strength: float, **numbers: float) -> None:
    for name, value in {"strength": strength, **numbers}.items():
        check_number(value, name, f"The {kind} at {site}")
    if vector is not None:
        check_row(vector, str(site))
