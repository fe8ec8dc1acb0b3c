"""Where each row of a run is: its phase, its place in the thinking, its position. Told by the token ids alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from probes.model.loading import delimiters_of, tokenizer_of
from probes.model.tokens import Delimiters

PHASES = ("prompt", "thinking", "answer")
Ids = tuple[int, ...]

_PAD = -1
_NOWHERE = Delimiters(open=(), close=())


@dataclass(eq=False)
class Clock:
    """Says, for the tokens of the current forward pass, which phase of its turn each is in, and how far into it.

    The phase of a token is the last delimiter up to it: the header of the model's turn begins *prompt*, the opening
    delimiter *thinking*, the closing one *answer*; so every token has one phase, the one that its prediction belongs
    to. A header opens a turn only if a user's header stands between it and the header before, where that is
    known. What stands before the last opened turn of a pass is prompt: earlier turns do not count. A turn with
    neither delimiter is all prompt. Pads have no phase, and neither have the tokens with which a batch fills rows that
    have ended (`pad` after one of `ends`). State is constant: some numbers and the last few ids of each row, updated
    from the new tokens alone, on their device.
    """

    delimiters: Delimiters
    ends: Ids = ()
    pad: int | None = None
    markers: tuple[tuple[Ids, ...], ...] = ()
    phase: Int[Tensor, "batch new"] | None = field(default=None, repr=False)
    thought: Int[Tensor, "batch new"] | None = field(default=None, repr=False)
    position: Int[Tensor, "batch new"] | None = field(default=None, repr=False)
    opens: Bool[Tensor, "batch new"] | None = field(default=None, repr=False)
    marked: tuple[Int[Tensor, "batch new"], ...] = field(default=(), repr=False)
    starts: bool = False
    _seen: int = 0
    _state: "_State | None" = field(default=None, repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel, *, needed: bool = True, markers: Sequence[tuple[Ids, ...]] = ()) -> "Clock":
        """The clock of a model. Raises ValueError where phases are `needed` and the model has no delimiters."""
        tokenizer, config = tokenizer_of(model), model.generation_config
        try:
            delimiters = delimiters_of(model)
        except ValueError:
            if needed:
                raise
            delimiters = _NOWHERE
        found = [tokenizer.eos_token_id, None if config is None else config.eos_token_id]
        ends = {end for ids in found if ids is not None for end in (ids if isinstance(ids, list) else [ids])}
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return cls(delimiters, tuple(sorted(ends)), pad, tuple(markers))

    @property
    def knows_phases(self) -> bool:
        return bool(self.delimiters.open)

    def advance(
        self, input_ids: Int[Tensor, "batch new"], attention_mask: Int[Tensor, "batch total"] | None, n_past: int
    ) -> None:
        """Take in the new tokens of a pass whose cache holds `n_past`. Raises ValueError where it lost the thread.

        Then `phase` is -1 at pads, else an index into `PHASES`; `thought` counts the thinking's tokens from 0 at the
        end of its opening delimiter, and is -1 elsewhere; `position` is the place in the row, pads not counted;
        `opens` tells the last token of a turn's header; `marked` counts, for each of `markers`, how many have ended
        in this turn's thinking; `starts` says that a run began with this pass.
        """
        batch, new = input_ids.shape
        self.starts = n_past == 0
        if self.starts:
            self._seen, self._state = 0, _State.at_start(input_ids, self._memory, len(self.markers))
        state = self._state
        if state is None or n_past != self._seen or len(state.phase) != batch:
            raise ValueError(
                f"The cache holds {n_past} tokens of {batch} rows, but the clock saw {self._seen}: it cannot follow "
                "beam search, assisted decoding, or a cache that began before the recipe was applied."
            )
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask[:, -new:].bool()
        window = torch.cat([state.tail, input_ids.where(real, _PAD)], dim=1)
        filled = self._filled(window, state, new)
        real = real & ~filled
        window = torch.cat([state.tail, input_ids.where(real, _PAD)], dim=1)
        phase, opens, armed = self._read(window, state, new)
        self.opens = opens & real
        self.phase = phase.where(real, _PAD)
        self.position = real.cumsum(1) - 1 + state.length[:, None]
        fresh = ~self.opens.any(1, keepdim=True)  # what was counted before belongs to an earlier turn where one opened
        thinks = self.phase == 1
        thoughts = thinks.cumsum(1) + state.thoughts[:, None] * fresh
        self.thought = (thoughts - 1).where(thinks, -1)
        self.marked = tuple(
            (_any_ends(window, ways, new) & thinks).cumsum(1) + before[:, None] * fresh
            for ways, before in zip(self.markers, state.marked, strict=True)
        )
        self._state = _State(
            phase[:, -1],
            armed,
            window[:, window.shape[1] - self._memory :],
            self.position[:, -1] + 1,
            thoughts[:, -1],
            tuple(count[:, -1] for count in self.marked),
            filled[:, -1],
        )
        self._seen += new

    @property
    def real(self) -> Bool[Tensor, "batch new"]:
        """The tokens of the current pass that are no pads."""
        return self._now(self.phase) != _PAD

    def mask(self, phase: str) -> Bool[Tensor, "batch new"]:
        """The tokens of the current pass that are in a phase, or in any (`all`)."""
        return self.real if phase == "all" else self._now(self.phase) == PHASES.index(phase)

    def mask_of_phases(self) -> Bool[Tensor, "phases batch new"]:
        """For each phase, the tokens of the current pass that are in it."""
        phase = self._now(self.phase)
        return torch.stack([phase == i for i in range(len(PHASES))])

    def positions(self) -> Int[Tensor, "batch new"]:
        """The place of each token of the current pass in its row, pads not counted."""
        return self._now(self.position)

    def _now(self, value: Tensor | None) -> Tensor:
        if value is None:
            raise ValueError("The clock has seen no tokens yet.")
        return value

    @property
    def _memory(self) -> int:
        d = self.delimiters
        wanted = (d.open, d.close, d.turn, d.user, *(ids for ways in self.markers for ids in ways), (0, 0))
        return max(map(len, wanted)) - 1

    def _filled(self, window: Tensor, state: "_State", new: int) -> Tensor:
        """Which of the last `new` tokens only fill a row that has ended: `pad`, and after one of `ends` or such a fill.

        Where `pad` is itself one of `ends`, the first of a run is the end, and the others fill.
        """
        ids, before = window[:, window.shape[1] - new :], window[:, window.shape[1] - new - 1 : -1]
        if self.pad is None or not self.ends:
            return torch.zeros_like(ids, dtype=torch.bool)
        is_pad = ids == self.pad
        starts = is_pad & torch.stack([before == end for end in self.ends]).any(0)
        place = torch.arange(new, device=ids.device).expand_as(ids)
        latest, broken = _latest(starts, place), _latest(~is_pad, place)
        carried = state.filled[:, None] & (broken < 0)
        return is_pad & ((latest > broken) | carried)

    def _read(self, window: Tensor, state: "_State", new: int) -> tuple[Tensor, Tensor, Tensor]:
        """Phases of the last `new` tokens of the window, pads included; which tokens open a turn, and whether the next
        header would."""
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
        return phase.masked_fill(place <= turn, 0), opens, armed


@dataclass(frozen=True, eq=False)
class _State:
    """Of each row: the phase of its last token, whether a header would open a turn, its last ids, how many tokens,
    thinking tokens and markers it has, and whether it ended and is filled."""

    phase: Int[Tensor, " batch"]
    armed: Bool[Tensor, " batch"]
    tail: Int[Tensor, "batch tail"]
    length: Int[Tensor, " batch"]
    thoughts: Int[Tensor, " batch"]
    marked: tuple[Int[Tensor, " batch"], ...]
    filled: Bool[Tensor, " batch"]

    @classmethod
    def at_start(cls, ids: Tensor, memory: int, markers: int) -> "_State":
        batch = len(ids)
        zero, no = ids.new_zeros(batch), torch.zeros(batch, dtype=torch.bool, device=ids.device)
        return cls(zero, ~no, ids.new_full((batch, memory), _PAD), zero, zero, (zero,) * markers, no)


def _latest(hit: Tensor, place: Tensor) -> Tensor:
    """For each token the place of the latest hit up to it, -1 before the first."""
    return place.where(hit, -1).cummax(1).values


def _ends(window: Tensor, wanted: Ids, new: int) -> Tensor:
    """Where, among the last `new` tokens, `wanted` ends."""
    hit = torch.full_like(window[:, window.shape[1] - new :], bool(wanted), dtype=torch.bool)
    for back, token in enumerate(reversed(wanted)):
        hit &= window[:, window.shape[1] - new - back : window.shape[1] - back] == token
    return hit


def _any_ends(window: Tensor, ways: tuple[Ids, ...], new: int) -> Tensor:
    return torch.stack([_ends(window, ids, new) for ids in ways]).any(0)
