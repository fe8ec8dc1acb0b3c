"""Changes to what a router chose: reinforce an expert, force it, or forbid it."""

import math
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from probes.model.routers import Expert, block_at
from probes.model.sites import Site


@dataclass(frozen=True, eq=False)
class Reinforce:
    """The routing weight of one expert times `strength`, where the router has chosen it (RICE, Wang et al. 2025).

    It acts after the top-k, and the weights are not normalised again, unless `renormalise` asks for it: then they keep
    their sum. The paper's strength is 64; 1 changes nothing. Raises ValueError for another site, or a strength below 0.

    >>> from steer.interventions import Reinforce
    >>> reinforce = Reinforce.of((2, 5), strength=8.0)
    >>> str(reinforce.site), reinforce.strength
    ('L2E5.routing', 8.0)
    """

    kind: ClassVar[str] = "reinforce"
    vector: ClassVar[None] = None
    birth: ClassVar[None] = None
    site: Site
    strength: float = 64.0
    renormalise: bool = False

    def __post_init__(self) -> None:
        _check(self.kind, self.site)
        if not math.isfinite(self.strength) or self.strength < 0:
            raise ValueError(
                f"The reinforce at {self.site} has strength {self.strength}. Give a finite number, 0 or more."
            )

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError or IndexError where the model has no such expert."""
        check_expert(model, self.site)

    @classmethod
    def of(cls, expert: Expert, strength: float = 64.0, *, renormalise: bool = False) -> "Reinforce":
        """For an expert by its layer and number."""
        return cls(Site(expert[0], "routing", expert=expert[1]), strength, renormalise)


@dataclass(frozen=True, eq=False)
class Force:
    """An expert is always chosen: its logit becomes the largest plus .01, before the family's own rule (SteerMoE,
    Fayyaz et al. 2025). Where the family chooses by a bias of its own, that is raised, and the weight stays the
    router's. Raises ValueError for a site that is no expert's.

    >>> from probes import load
    >>> from steer import Recipe
    >>> from steer.interventions import Force
    >>> Recipe.of(load("organism"), [Force.of((2, 5))]).table().rows
    ((0, 'force', 'L2E5.routing', 'all', 1.0),)
    """

    kind: ClassVar[str] = "force"
    vector: ClassVar[None] = None
    birth: ClassVar[None] = None
    strength: ClassVar[float] = 1.0
    site: Site

    def __post_init__(self) -> None:
        _check(self.kind, self.site)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError or IndexError where the model has no such expert."""
        check_expert(model, self.site)

    @classmethod
    def of(cls, expert: Expert) -> "Force":
        """For an expert by its layer and number."""
        return cls(Site(expert[0], "routing", expert=expert[1]))


@dataclass(frozen=True, eq=False)
class Forbid:
    """An expert is never chosen: its logit, or the bias the family chooses by, becomes too small for that (SteerMoE,
    Fayyaz et al. 2025). Raises ValueError for a site that is no expert's.

    >>> from probes import load
    >>> from steer import Recipe
    >>> from steer.interventions import Forbid
    >>> Recipe.of(load("organism"), [Forbid.of((2, 5))]).table().rows
    ((0, 'forbid', 'L2E5.routing', 'all', 1.0),)
    """

    kind: ClassVar[str] = "forbid"
    vector: ClassVar[None] = None
    birth: ClassVar[None] = None
    strength: ClassVar[float] = 1.0
    site: Site

    def __post_init__(self) -> None:
        _check(self.kind, self.site)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError or IndexError where the model has no such expert."""
        check_expert(model, self.site)

    @classmethod
    def of(cls, expert: Expert) -> "Forbid":
        """For an expert by its layer and number."""
        return cls(Site(expert[0], "routing", expert=expert[1]))


RoutingEdit = Reinforce | Force | Forbid


def check_expert(model: PreTrainedModel, site: Site) -> None:
    """Raise ValueError or IndexError where the model has no such expert."""
    block = block_at(model, site.layer)
    if site.expert is not None and not site.expert < block.n_experts:
        raise IndexError(
            f"Expert {site.expert} is out of range: layer {site.layer} has experts 0 to {block.n_experts - 1}."
        )


def _check(kind: str, site: Site) -> None:
    if site.name != "routing" or site.expert is None:
        raise ValueError(f"A {kind} acts on one expert's routing weight, such as L3E5.routing, not at {site}.")
