"""When a row is touched at all: what its prompt holds."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from probes.directions.direction import Direction
from probes.directions.provenance import Provenance
from probes.directions.vector import check_number, check_row
from probes.model.sites import Site
from probes.tables import Brief


@dataclass(frozen=True, eq=False, repr=False)
class Condition(Brief):
    """Touch a row from the end of its prompt on, if the prompt's mean projection x.v̂ at `site` is above `threshold`.

    Conditional activation steering (Lee et al. 2024), by a projection in activation units rather than a cosine. With
    `above` false, if it is not above. Raises ValueError where a number, or an entry of the vector, is not finite.

    >>> import torch
    >>> from probes import Site
    >>> from steer import Condition, Scope
    >>> condition = Condition(Site(1, "resid_post"), torch.ones(96), threshold=0.5)
    >>> print(Scope("thinking", condition=condition))
    thinking, condition
    """

    site: Site
    vector: Float[Tensor, " d_model"]
    threshold: float
    above: bool = True
    birth: Provenance | None = None

    def __post_init__(self) -> None:
        check_row(self.vector, f"the condition at {self.site}")
        check_number(self.threshold, "threshold", f"The condition at {self.site}")

    @classmethod
    def of(cls, direction: Direction, threshold: float, *, above: bool = True) -> "Condition":
        """Along a direction, at its site; the threshold is in activation units."""
        return cls(direction.site, direction.vector, threshold, above, direction.provenance)
