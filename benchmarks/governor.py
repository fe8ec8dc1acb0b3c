"""Hold the mean thinking length of a stream of completions at a set-point, by what the last ones took."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Governor:
    """Integral control: `aim` is what a `Controller` should be told, so that the mean comes out at `set_point`.

    After each batch aim moves by rate * (set_point - mean thinking length of the batch), and stays between a quarter of
    the set-point and four times it. It sees lengths alone, no answers.
    """

    set_point: float
    rate: float = 0.5
    aim: float = 0.0

    def __post_init__(self) -> None:
        if not self.set_point > 0 or not 0 < self.rate <= 1:
            raise ValueError(
                f"A governor needs a set-point above 0 and a rate above 0 and at most 1, but got {self.set_point} and "
                f"{self.rate}."
            )
        self.aim = self.aim or self.set_point

    def saw(self, lengths: Sequence[int]) -> None:
        """The thinking tokens of a batch that is done."""
        if not lengths:
            raise ValueError("A governor learns from lengths, but the batch was empty.")
        moved = self.aim + self.rate * (self.set_point - sum(lengths) / len(lengths))
        self.aim = min(max(moved, self.set_point / 4), self.set_point * 4)
