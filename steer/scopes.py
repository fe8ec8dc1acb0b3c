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

    The phase of a token is the last delimiter up to it: the header of the model's turn begins *prompt*, the opening
    delimiter *thinking*, the closing one *answer*; so every token has one phase, the one that its prediction belongs
    to. A header opens a turn only if a user's header stands between it and the header before, where that is
    known. What stands before the last opened turn of a pass is prompt: earlier turns do not count. A turn with
    neither delimiter is all prompt. Pads have no phase. State is constant: a phase and the last few ids of each row,
    updated from the new tokens alone, on their device.
    """

    delimiters: Delimiters
    phase: Int[Tensor, "batch new"] | None = field(default=None, repr=False)
    _seen: int = 0
    _state: "_State | None" = field(default=None, repr=False)

    def advance(
        self, input_ids: Int[Tensor, "batch new"], attention_mask: Int[Tensor, "batch total"] | None, n_past: int
    ) -> None:
        """Take in the new tokens of a pass whose cache holds `n_past`. Raises ValueError where it lost the thread."""
        batch, new = input_ids.shape
        if n_past == 0:
            self._seen, self._state = 0, _State.at_start(input_ids, self._memory)
        state = self._state
        if state is None or n_past != self._seen or len(state.phase) != batch:
            raise ValueError(
                f"The cache holds {n_past} tokens of {batch} rows, but the clock saw {self._seen}: it cannot follow "
                "beam search, assisted decoding, or a cache that began before the recipe was applied."
            )
        real = input_ids == input_ids if attention_mask is None else attention_mask[:, -new:].bool()
        window = torch.cat([state.tail, input_ids.where(real, _PAD)], dim=1)
        phase, armed = self._read(window, state, new)
        self.phase = phase.where(real, _PAD)
        self._state = _State(phase[:, -1], armed, window[:, window.shape[1] - self._memory :])
        self._seen += new

    def mask(self, scope: Scope) -> Bool[Tensor, "batch new"]:
        """The tokens of the current pass that are in `scope`."""
        if self.phase is None:
            raise ValueError("The clock has seen no tokens yet.")
        return self.phase != _PAD if scope == "all" else self.phase == _PHASES[scope]

    @property
    def _memory(self) -> int:
        d = self.delimiters
        return max(map(len, (d.open, d.close, d.turn, d.user))) - 1

    def _read(self, window: Tensor, state: "_State", new: int) -> tuple[Tensor, Tensor]:
        """Phases of the last `new` tokens of the window, pads included, and whether the next header opens a turn."""
        d = self.delimiters
        place = torch.arange(new, device=window.device).expand(len(window), new)
        header, user = (_latest(_ends(window, wanted, new), place) for wanted in (d.turn, d.user))
        before = torch.cat([torch.full_like(header[:, :1], -1), header[:, :-1]], dim=1)  # the header before this token
        opens = header == place
        if d.user:
            opens &= (user > before) | ((before < 0) & state.armed[:, None])
        armed = (user[:, -1] > header[:, -1]) | ((header[:, -1] < 0) & state.armed)

        event = torch.full_like(place, _PAD).masked_fill(opens, 0)
        for number, wanted in ((1, d.open), (2, d.close)):
            event = event.masked_fill(_ends(window, wanted, new), number)
        latest = _latest(event != _PAD, place)
        phase = event.gather(1, latest.clamp(min=0)).where(latest >= 0, state.phase[:, None])
        turn = _latest(opens, place)[:, -1:]
        return phase.masked_fill(place <= turn, 0), armed


@dataclass(frozen=True, eq=False)
class _State:
    """Of each row: the phase of its last token, whether a header would open a turn, and its last ids."""

    phase: Int[Tensor, " batch"]
    armed: Bool[Tensor, " batch"]
    tail: Int[Tensor, "batch tail"]

    @classmethod
    def at_start(cls, ids: Tensor, memory: int) -> "_State":
        batch = len(ids)
        return cls(ids.new_zeros(batch), ids.new_ones(batch).bool(), ids.new_full((batch, memory), _PAD))


def _latest(hit: Tensor, place: Tensor) -> Tensor:
    """For each token the place of the latest hit up to it, -1 before the first."""
    return place.where(hit, -1).cummax(1).values


def _ends(window: Tensor, wanted: tuple[int, ...], new: int) -> Tensor:
    """Where, among the last `new` tokens, `wanted` ends."""
    hit = torch.full_like(window[:, window.shape[1] - new :], bool(wanted), dtype=torch.bool)
    for back, token in enumerate(reversed(wanted)):
        hit &= window[:, window.shape[1] - new - back : window.shape[1] - back] == token
    return hit
