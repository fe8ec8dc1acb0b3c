"""Which tokens an intervention touches: one clock for each run decides, from the token ids."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probes.tokens import Delimiters

Scope = Literal["all", "prompt", "thinking", "answer"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_PHASES: dict[Scope, int] = {"prompt": 0, "thinking": 1, "answer": 2}
_PAD = -1


@dataclass(eq=False)
class Clock:
    """Says, for the tokens of the current forward pass, which phase of its turn each is in.

    The phase of a token is the last delimiter up to it: the turn's header begins *prompt*, the opening delimiter
    *thinking*, the closing one *answer*; so every token has one phase, and it is the phase that its prediction
    belongs to. What stands before the last header of a pass is prompt: earlier turns do not count. A turn that
    never opens its thinking is all prompt. Pads have no phase. State is constant: a phase and the last few ids of
    each row, updated from the new tokens alone, on their device.
    """

    delimiters: Delimiters
    phase: Int[Tensor, "batch new"] | None = field(default=None, repr=False)
    _seen: int = 0
    _last: Int[Tensor, " batch"] | None = field(default=None, repr=False)
    _tail: Int[Tensor, "batch tail"] | None = field(default=None, repr=False)

    def advance(
        self,
        input_ids: Int[Tensor, "batch new"],
        attention_mask: Int[Tensor, "batch total"] | None,
        n_past: int,
    ) -> None:
        batch, new = input_ids.shape
        if n_past == 0:
            self._seen = 0
            self._last = input_ids.new_zeros(batch)
            self._tail = input_ids.new_full((batch, self._memory), _PAD)
        last, tail = self._last, self._tail
        if last is None or tail is None or n_past != self._seen or len(last) != batch:
            raise ValueError(
                f"The cache holds {n_past} tokens of {batch} rows, but the clock saw {self._seen}: it cannot follow "
                "beam search, assisted decoding, or a cache that began before the recipe was applied."
            )
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -new:]
        ids = torch.where(real.bool(), input_ids, _PAD)
        window = torch.cat([tail, ids], dim=1)
        self.phase = torch.where(real.bool(), self._phases(window, last, new), _PAD)
        self._last = torch.where(real[:, -1].bool(), self.phase[:, -1], last)
        self._tail = window[:, window.shape[1] - self._memory :]
        self._seen += new

    def mask(self, scope: Scope) -> Bool[Tensor, "batch new"]:
        """The tokens of the current pass that are in `scope`."""
        if self.phase is None:
            raise ValueError("The clock has seen no tokens yet.")
        return self.phase != _PAD if scope == "all" else self.phase == _PHASES[scope]

    @property
    def _memory(self) -> int:
        d = self.delimiters
        return max(len(d.open), len(d.close), len(d.turn)) - 1

    def _phases(self, window: Tensor, last: Tensor, new: int) -> Tensor:
        d = self.delimiters
        event = torch.full_like(window[:, -new:], _PAD)
        for wanted, number in ((d.turn, 0), (d.open, 1), (d.close, 2)):
            if wanted:
                event = torch.where(_ends(window, wanted, new), number, event)
        place = torch.arange(new, device=event.device).expand_as(event)
        latest = torch.where(event != _PAD, place, -1).cummax(1).values
        phase = torch.where(latest >= 0, event.gather(1, latest.clamp(min=0)), last[:, None])
        turn = torch.where(event == 0, place, -1).amax(1, keepdim=True)
        return torch.where(place <= turn, 0, phase)


def _ends(window: Tensor, wanted: tuple[int, ...], new: int) -> Tensor:
    """Where, among the last `new` tokens, `wanted` ends."""
    hit = torch.ones_like(window[:, -new:], dtype=torch.bool)
    for back, token in enumerate(reversed(wanted)):
        hit &= window[:, window.shape[1] - new - back : window.shape[1] - back] == token
    return hit
