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
    `above` false, if it is not above.
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
        return cls(direction.site, direction.vector, threshold, above, direction.provenance)
