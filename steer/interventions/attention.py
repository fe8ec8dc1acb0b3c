"""What heads pay to a region of the context, scaled."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from probes.directions.vector import check_number
from probes.model.architectures import check_heads
from probes.model.sites import Site
from probes.words import checked

Region = Literal["prompt", "thinking", "answer"]

_TOKENS = 2**31  # more than any context has


@checked
@dataclass(frozen=True)
class Attend:
    """softmax(scores + log(strength) [key in region]): the attention weights of some keys times `strength`, before they
    are normalised again, at one head (`L3H2.pattern`) or all heads of a layer.

    The region is the tokens [first, last) of the phase `keys`, counted from its beginning; the step's scope says which
    queries attend to it so. 1 changes nothing; 0 hides the region, but for a query that sees nothing else. A learned
    sink keeps its part. As in PASTA *(Zhang et al. 2023)*, which weakens all else instead: the same once normalised.
    A causal test of constraint attention *(Li et al. 2025, When Thinking Fails)*. Raises ValueError for another site, a
    strength that is not finite or below 0, and an empty region.

    >>> from probes import Site, generate, load
    >>> from steer import Attend, Recipe, applied
    >>> model = load("organism")
    >>> ignore = [Attend(Site(layer, "pattern"), strength=0.0, first=3, last=5) for layer in range(4)]  # b +4
    >>> with applied(model, Recipe.of(model, ignore)) as log:
    ...     (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> completion.thinking
    'Okay a =3 b -8 =5 c *7 =5'
    """

    kind: ClassVar[str] = "attend"
    vector: ClassVar[None] = None
    birth: ClassVar[None] = None
    site: Site
    strength: float
    keys: Region = "prompt"
    first: int = 0
    last: int | None = None

    def __post_init__(self) -> None:
        if self.site.name != "pattern":
            raise ValueError(f"An attend acts on what heads attend to, such as L3.pattern, not at {self.site}.")
        check_number(self.strength, "strength", f"The attend at {self.site}")
        if self.strength < 0:
            raise ValueError(f"The attend at {self.site} has strength {self.strength}. Give 0 or more.")
        stop = _TOKENS if self.last is None else self.last
        if not 0 <= self.first < stop <= _TOKENS:
            raise ValueError(
                f"The attend at {self.site} has keys {self.first} to {self.last} of the {self.keys}, which are none."
            )

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError or IndexError where the model has no such heads."""
        check_heads(model, self.site)
