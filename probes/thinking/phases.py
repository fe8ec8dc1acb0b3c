"""Where each row of a run is: its phase, its place in the thinking, its position. Told by the token ids alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from probes.model.delimiters import Delimiters
from probes.model.loading import delimiters_if_any, delimiters_of, tokenizer_of
from probes.rows import Remembered, Rows
from probes.tables import Brief
from probes.thinking.stepping import Tables, armed_of, control_of, filled_of, phase_of, tables

PHASES = ("prompt", "thinking", "answer")
Ids = tuple[int, ...]

_PAD = -1


@dataclass(frozen=True, eq=False, repr=False)
class Phases(Brief):
    """Where the tokens of one forward pass are. -1 stands where there is nothing to count.

    `phase` is an index into `PHASES`, -1 at pads; `thought` counts the thinking's tokens from 0 at the end of its
    opening delimiter, -1 elsewhere; `position` is the place in the row, pads not counted; `marked` counts, for each of
    the clock's markers, how many have ended in this turn's thinking; `ended` tells where they end, anywhere; `opens`
    tells the last token of a turn's header; `real` the tokens that are no pads; `starts` that the rows of this pass
    begin with it; `rows` says which of their run they are, where that is known.

    >>> import torch
    >>> from probes import generate, load
    >>> from probes.thinking import Clock
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7 quick"])
    >>> now = Clock.of(model).advance(torch.tensor([completion.all_ids]), None, 0)
    >>> now.position
    tensor([[ 0,  1,  2,  3,  4,  5,  6,  7,  8,  9, 10, 11, 12, 13]])
    >>> now.thought
    tensor([[-1, -1, -1, -1, -1, -1, -1, -1, -1,  0,  1, -1, -1, -1]])
    >>> now.mask("answer").int()
    tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]], dtype=torch.int32)
    """

    phase: Int[Tensor, "batch new"]
    thought: Int[Tensor, "batch new"]
    position: Int[Tensor, "batch new"]
    marked: tuple[Int[Tensor, "batch new"], ...]
    ended: tuple[Bool[Tensor, "batch new"], ...]
    opens: Bool[Tensor, "batch new"]
    real: Bool[Tensor, "batch new"]
    starts: bool
    rows: Rows | None = None

    def mask(self, phase: str) -> Bool[Tensor, "batch new"]:
        """The tokens that are in a phase, or in any (`all`)."""
        return self.real if phase == "all" else self.phase == PHASES.index(phase)

    def masks(self) -> Bool[Tensor, "phases batch new"]:
        """For each of `PHASES`, the tokens that are in it."""
        return torch.stack([self.phase == i for i in range(len(PHASES))])


@dataclass(eq=False)
class Clock:
    """Says, pass by pass, which phase of its turn each new token is in, and how far into it.

    The phase of a token is the last delimiter up to it: the header of the model's turn begins *prompt*, the opening
    delimiter *thinking*, the closing one *answer*; so every token has one phase, the one that its prediction belongs
    to. A header opens a turn only if a user's header, or a tool's, stands between it and the header before, where
    that is known. What stands before the last opened turn of a pass is prompt: earlier turns do not count. A turn with
    neither delimiter is all prompt. Pads have no phase, and neither have the tokens with which a batch fills rows that
    have ended (`pad` after one of `ends`). State is constant: some numbers and the last few ids of each row, updated
    from the new tokens alone, on their device.

    >>> import torch
    >>> from probes import generate, load
    >>> from probes.thinking import Clock
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7 quick"])
    >>> clock = Clock.of(model)
    >>> clock.advance(torch.tensor([completion.prompt_ids]), None, 0).phase
    tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0]])
    >>> clock.advance(torch.tensor([completion.ids]), None, len(completion.prompt_ids)).phase
    tensor([[1, 1, 2, 2, 2]])
    """

    delimiters: Delimiters
    ends: Ids = ()
    pad: int | None = None
    markers: tuple[tuple[Ids, ...], ...] = ()
    _seen: int = 0
    _on: dict[torch.device, Tables] = field(default_factory=dict, repr=False)
    _memory: "Remembered[_State | None]" = field(default_factory=lambda: Remembered(None), repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel, *, needed: bool = True, markers: Sequence[tuple[Ids, ...]] = ()) -> "Clock":
        """The clock of a model. Raises ValueError where phases are `needed` and the model has no delimiters."""
        tokenizer, config = tokenizer_of(model), model.generation_config
        delimiters = delimiters_of(model) if needed else delimiters_if_any(model)
        found = [tokenizer.eos_token_id, None if config is None else config.eos_token_id]
        ends = {end for ids in found if ids is not None for end in (ids if isinstance(ids, list) else [ids])}
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return cls(delimiters, tuple(sorted(ends)), pad, tuple(markers))

    @property
    def knows_phases(self) -> bool:
        """Has the model delimiters, so that its phases can be told?"""
        return bool(self.delimiters.open)

    def advance(
        self,
        input_ids: Int[Tensor, "batch new"],
        attention_mask: Int[Tensor, "batch total"] | None,
        n_past: int,
        rows: Rows | None = None,
    ) -> Phases:
        """Take in the new tokens of a pass whose cache holds `n_past`, and say where they are.

        `rows`, of a run whose rows leave and join, says which the pass holds. Raises ValueError where it lost the
        thread: the cache is not the one that it followed.
        """
        batch, new = input_ids.shape
        starts = n_past == 0
        if starts:
            self._seen = 0
            self._memory.begin(rows, self._at_start(input_ids))
        elif self._memory.turn(rows) and rows is not None:
            self._seen = rows.n_past
        state = self._memory.state
        if state is None or n_past != self._seen or len(state.control) != batch:
            raise ValueError(
                f"The cache holds {n_past} tokens of {batch} rows, but the clock saw {self._seen}: it cannot follow "
                "beam search, assisted decoding, or a cache that began before the recipe was applied."
            )
        over = self._over(n_past, rows)
        if new == 1 and not starts and over is not None:
            mask = None if attention_mask is None else attention_mask[:, -1:].bool()
            return self._step(input_ids, mask, state, rows, over=over)
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask[:, -new:].bool()
        window = torch.cat([state.tail, input_ids.where(real, _PAD)], dim=1)
        filled = self._filled(window, state, new)
        if rows is not None and n_past + new > min(rows.begins):
            filled = filled | _past_ends(input_ids, n_past, rows)
        real = real & ~filled
        window = torch.cat([state.tail, input_ids.where(real, _PAD)], dim=1)
        turn_phase, turn_opens, armed = self._read(window, state, new)
        opens, phase = turn_opens & real, turn_phase.where(real, _PAD)
        position = real.cumsum(1) + state.position[:, None]
        fresh = ~opens.any(1, keepdim=True)  # what was counted before belongs to an earlier turn where one opened
        thinks = phase == 1
        thoughts = thinks.cumsum(1) + state.thoughts[:, None] * fresh
        ended = tuple(_any_ends(window, ways, new) & real for ways in self.markers)
        marked = tuple(
            (ends & thinks).cumsum(1) + before[:, None] * fresh
            for ends, before in zip(ended, state.marked, strict=True)
        )
        tail = window[:, window.shape[1] - self._tail :]
        bits, ended_now = self._tables(tail.device).seen(tail)
        self._memory.state = _State(
            control_of(turn_phase[:, -1], armed, filled[:, -1], ended_now),
            bits,
            tail,
            position[:, -1],
            thoughts[:, -1],
            tuple(count[:, -1] for count in marked),
        )
        self._seen += new
        return Phases(phase, (thoughts - 1).where(thinks, -1), position, marked, ended, opens, real, starts, rows)

    def _step(self, ids: Tensor, mask: Tensor | None, state: "_State", rows: Rows | None, *, over: bool) -> Phases:
        """One token a row, by the tables: what `advance` says of it, for a fifth of the operations."""
        now = self._tables(ids.device).step(ids, state.control, state.bits, mask, over=over)
        position = state.position + now.count[:, 0]
        thoughts = torch.addcmul(now.thinks[:, 0], state.thoughts, now.fresh[:, 0])
        marked = tuple(
            torch.addcmul((ended & now.thinks)[:, 0], before, now.fresh[:, 0])
            for ended, before in zip(now.ended, state.marked, strict=True)
        )
        tail = torch.cat([state.tail[:, 1:], ids.where(now.real, _PAD)], dim=1)
        self._memory.state = _State(now.control, now.bits, tail, position, thoughts, marked)
        self._seen += 1
        thought = thoughts[:, None] * now.thinks - 1
        counts = tuple(count[:, None] for count in marked)
        return Phases(now.phase, thought, position[:, None], counts, now.ended, now.opens, now.real, False, rows)

    def _over(self, n_past: int, rows: Rows | None) -> bool | None:
        """Does an end end its row, in a pass of one token? None where that differs from row to row."""
        if rows is None or n_past + 1 <= min(rows.begins):
            return False
        return True if n_past >= max(rows.begins) and set(rows.ends) == set(self.ends) else None

    def _tables(self, device: torch.device) -> Tables:
        if device not in self._on:
            self._on[device] = tables(self.delimiters, self.ends, self.pad, self.markers).to(device)
        return self._on[device]

    def _at_start(self, ids: Tensor) -> "_State":
        """No token was seen: a header would open a turn, of each row."""
        batch, found = len(ids), self._tables(ids.device)
        no, nothing = torch.zeros(batch, dtype=torch.bool, device=ids.device), ids.new_zeros(batch)
        tail = ids.new_full((batch, self._tail), _PAD)
        control = control_of(nothing, ~no, no, no)
        return _State(control, found.begin(batch), tail, nothing - 1, nothing, (nothing,) * len(self.markers))

    @property
    def _tail(self) -> int:
        d = self.delimiters
        wanted = (d.open, d.close, d.turn, d.user, d.tool, *(ids for ways in self.markers for ids in ways), (0, 0))
        texts = (needle.text for needle in (d.open_text, d.close_text) if needle is not None)
        return max(*map(len, wanted), *map(len, texts)) - 1

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
        carried = filled_of(state.control).bool()[:, None] & (broken < 0)
        return is_pad & ((latest > broken) | carried)

    def _read(self, window: Tensor, state: "_State", new: int) -> tuple[Tensor, Tensor, Tensor]:
        """Phases of the last `new` tokens of the window, pads included; which tokens open a turn, and whether the next
        header would."""
        d, was_armed = self.delimiters, armed_of(state.control).bool()
        place = torch.arange(new, device=window.device).expand(len(window), new)
        header, user, tool = (_latest(_ends(window, wanted, new), place) for wanted in (d.turn, d.user, d.tool))
        user = user.maximum(tool)
        before = torch.cat([torch.full_like(header[:, :1], -1), header[:, :-1]], dim=1)  # the header before this token
        opens = header == place
        if d.user:
            opens &= (user > before) | ((before < 0) & was_armed[:, None])
        armed = (user[:, -1] > header[:, -1]) | ((header[:, -1] < 0) & was_armed)

        event = torch.full_like(place, _PAD).masked_fill(opens, 0)
        for number, wanted, needle in ((1, d.open, d.open_text), (2, d.close, d.close_text)):
            hit = _ends(window, wanted, new) if needle is None else needle.ends(window)[:, window.shape[1] - new :]
            event = event.masked_fill(hit, number)
        latest = _latest(event != _PAD, place)
        phase = event.gather(1, latest.clamp(min=0)).where(latest >= 0, phase_of(state.control)[:, None])
        turn = _latest(opens, place)[:, -1:]
        return phase.masked_fill(place <= turn, 0), opens, armed


@dataclass(frozen=True, eq=False)
class _State:
    """Of each row: what it was (`probes.thinking.stepping`), what it has seen of each delimiter, its last ids, its last
    token's position, and how many thinking tokens and markers it has."""

    control: Int[Tensor, " batch"]
    bits: Int[Tensor, "batch patterns"]
    tail: Int[Tensor, "batch tail"]
    position: Int[Tensor, " batch"]
    thoughts: Int[Tensor, " batch"]
    marked: tuple[Int[Tensor, " batch"], ...]


def _past_ends(ids: Tensor, n_past: int, rows: Rows) -> Tensor:
    """Where a row's own tokens hold its end."""
    over = torch.zeros_like(ids, dtype=torch.bool)
    for end in rows.ends:
        over |= ids == end
    if n_past < max(rows.begins):  # a prompt may hold it, too
        begins = torch.tensor(rows.begins, device=ids.device)[:, None]
        over &= torch.arange(n_past, n_past + ids.shape[1], device=ids.device) >= begins
    return over


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
