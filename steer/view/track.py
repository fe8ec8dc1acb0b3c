"""A number for each token of a chain."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from probes.tables import Brief


@dataclass(frozen=True, eq=False, repr=False)
class Track(Brief):
    """A number for each token of a chain, prompt included; NaN where there is none. `group` is what it is shown under.

    Raises ValueError for values that are not one number a token, and a name or a group of none or several lines.

    >>> import torch
    >>> from steer.view import Track
    >>> Track("length so far", torch.arange(21.0), unit="tokens")
    Track(name='length so far', values=Tensor[21], unit='tokens', group='own')
    """

    name: str
    values: Float[Tensor, " tokens"]
    unit: str = ""
    group: str = "own"

    def __post_init__(self) -> None:
        for field, words in (("name", self.name), ("group", self.group)):
            if not words or "\n" in words:
                raise ValueError(f"A track has the {field} {words!r}: give it one line of words.")
        if self.values.dim() != 1:
            raise ValueError(f"The track {self.name!r} has the shape {list(self.values.shape)}: give one row.")
