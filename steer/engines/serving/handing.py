"""Hands each row's newest token to whoever asked for it, as a decoding that changes nothing but who has gone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from probes.generation.sampling import Event
from probes.rows import Rows
from steer.engines.serving.tickets import Ticket


@dataclass(eq=False)
class Handing:
    """Of one batch, the requests by the number of their row. It is a `Decoding`, and its own run."""

    ends: tuple[int, ...]
    name: str = "served"
    tickets: dict[int, Ticket] = field(default_factory=dict)
    _rows: tuple[int, ...] = ()

    @property
    def live(self) -> list[Ticket]:
        """Those whose rows are being written."""
        return [ticket for ticket in self.tickets.values() if not (ticket.over or ticket.left)]

    def begin(self, mask: Int[Tensor, "batch pos"]) -> "Handing":  # noqa: ARG002
        return self

    def turn(self, rows: Rows, mask: Int[Tensor, "batch pos"] | None) -> None:
        """From here on tokens are of these rows; those that were there before, and are no more, are forgotten."""
        self._rows = rows.numbers
        if mask is None:
            self.tickets = {number: self.tickets[number] for number in rows.numbers}

    def processors(self, draw: LogitsProcessorList) -> LogitsProcessorList:
        return LogitsProcessorList([*draw, _Hand([self.tickets[number] for number in self._rows], self.ends)])

    def events(self) -> Sequence[Sequence[Event]]:
        return [()] * len(self._rows)


class _Hand(LogitsProcessor):
    """Of rows that are side by side."""

    def __init__(self, tickets: list[Ticket], ends: tuple[int, ...]) -> None:
        self.tickets, self.ends, self.last = tickets, frozenset(ends), ends[0]

    def __call__(
        self,
        input_ids: Int[Tensor, "batch pos"],  # noqa: ARG002
        scores: Float[Tensor, "batch d_vocab"],
    ) -> Float[Tensor, "batch d_vocab"]:
        told = torch.stack([scores.argmax(1), scores.isnan().any(1).long()]).tolist()  # one wait for the device
        live = [not ticket.over for ticket in self.tickets]
        if any(bad and here for bad, here in zip(told[1], live, strict=True)):
            raise ValueError(
                "The model's scores are not numbers (NaN), so no token can be drawn: the strength may be too large for "
                "the model's dtype, or the weights are broken."
            )
        gone = [at for at, ticket in enumerate(self.tickets) if live[at] and ticket.left]
        for at, ticket in enumerate(self.tickets):
            if at in gone:
                ticket.over = True
            elif live[at]:
                ticket.take(told[0][at], self.ends)
        if not gone:
            return scores
        ended = scores.clone()
        ended[gone] = float("-inf")
        ended[gone, self.last] = 0.0
        return ended
