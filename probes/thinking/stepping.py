"""Where one new token a row is: the clock's rule as tables, so that a decode step takes some twenty operations.

Every delimiter is found by shift-and (Baeza-Yates and Gonnet 1992), as in `probes.needles`: bit i of a state says that
the text so far ends with the first i parts of the delimiter, tokens or letters, and bit 0 is always set. All but a few
hundred tokens of a vocabulary do the same to the bits, so a token has a class, and a class a row. Which delimiters end
at a token, and what the row was before it, then index a table of all that may follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probes.model.delimiters import Delimiters
from probes.needles import Needle

Ids = tuple[int, ...]
REAL, PAD, END, HEADER, USER, TOOL, OPEN, CLOSE = (1 << i for i in range(8))  # what is told of a token
CODES, BEFORE = 1 << 8, 24
_OTHER = 1  # the class of tokens that no delimiter holds; 0 is that of no token
Number = TypeVar("Number", int, Tensor)  # of one row, or of a batch of them


def control_of(phase: Number, armed: Number, filled: Number, ended: Number) -> Number:
    """What a row was: its phase, whether a header would open a turn, whether it is filled, or ended just now."""
    return CODES * (phase + 3 * (armed + 2 * (filled + 2 * ended)))


def phase_of(control: Number) -> Number:
    return (control // CODES) % 3


def armed_of(control: Number) -> Number:
    """1 or 0, as of the next two."""
    return (control // (3 * CODES)) % 2


def filled_of(control: Number) -> Number:
    return (control // (6 * CODES)) % 2


def ended_of(control: Number) -> Number:
    return (control // (12 * CODES)) % 2


@dataclass(frozen=True, eq=False)
class Step:
    """One token of each row, [batch 1]."""

    control: Int[Tensor, " batch"]
    bits: Int[Tensor, "batch patterns"]
    phase: Int[Tensor, "batch 1"]
    thinks: Int[Tensor, "batch 1"]
    fresh: Int[Tensor, "batch 1"]
    count: Int[Tensor, "batch 1"]
    real: Bool[Tensor, "batch 1"]
    opens: Bool[Tensor, "batch 1"]
    ended: tuple[Bool[Tensor, "batch 1"], ...]


@dataclass(frozen=True, eq=False)
class Tables:
    """`classes` of tokens, the last for all beyond; of each class what it does to the bits of every pattern (`starts`,
    `inner`, `length`, `last`) and its `flags`; `weights` of the patterns in a code; and by what a row was and the code
    what it is (`turns`: control, phase, thinks, fresh, real; `told`: real, opens), also where an end is one of a row
    that is `over`."""

    classes: Int[Tensor, " tokens"]
    moves: Int[Tensor, "classes columns"]
    weights: Int[Tensor, " patterns"]
    turns: Int[Tensor, "over index 5"]
    told: Bool[Tensor, "over index 2"]
    one: Int[Tensor, ""]
    ways: tuple[tuple[int, int], ...]  # of each marker, its columns

    def to(self, device: torch.device) -> "Tables":
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "ways"}
        return replace(self, **moved)

    def begin(self, batch: int) -> Int[Tensor, "batch patterns"]:
        """The bits of rows of which nothing was seen."""
        return self.one.expand(batch, len(self.weights))

    def seen(self, tail: Int[Tensor, "batch tail"]) -> tuple[Int[Tensor, "batch patterns"], Int[Tensor, " batch"]]:
        """What a row's last tokens, -1 for none, leave of the patterns that they begin; and, 1 or 0, whether the very
        last is an end."""
        bits, flags = self.begin(len(tail)), tail.new_zeros(len(tail))
        for ids in tail.split(1, dim=1):
            bits, _, flags = self.read(ids, bits, ids >= 0)
        return bits, flags // END % 2

    def read(
        self, ids: Int[Tensor, "batch 1"], bits: Int[Tensor, "batch patterns"], real: Bool[Tensor, "batch 1"] | None
    ) -> tuple[Int[Tensor, "batch patterns"], Bool[Tensor, "batch patterns"], Int[Tensor, " batch"]]:
        """The bits after the token, which patterns it completes, and its flags."""
        kind = self.classes[ids[:, 0].clamp(max=len(self.classes) - 1)]
        if real is not None:
            kind = kind * real[:, 0]
        row, n = self.moves[kind], len(self.weights)
        starts, inner, length, last = row[:, : 4 * n].unflatten(1, (4, n)).unbind(1)
        return starts | ((bits & inner) << length), (bits & last) != 0, row[:, -1]

    def step(
        self,
        ids: Int[Tensor, "batch 1"],
        control: Int[Tensor, " batch"],
        bits: Int[Tensor, "batch patterns"],
        real: Bool[Tensor, "batch 1"] | None,
        *,
        over: bool,
    ) -> Step:
        after, hits, flags = self.read(ids, bits, real)
        code = (hits * self.weights).sum(1) + flags + control
        turn, told = self.turns[int(over), code], self.told[int(over), code]
        phase, thinks, fresh, count = turn[:, None, 1:].unbind(2)
        is_real = told[:, :1]
        ended = tuple(
            (hits[:, a:b].any(1, keepdim=True) if b - a > 1 else hits[:, a:b]) & is_real for a, b in self.ways
        )
        kept = torch.where(is_real, after, self.one)
        return Step(turn[:, 0], kept, phase, thinks, fresh, count, is_real, told[:, 1:], ended)


def tables(d: Delimiters, ends: Ids, pad: int | None, markers: tuple[tuple[Ids, ...], ...]) -> Tables:
    """Of a clock with these words."""
    return _tables(d, (d.open_text, d.close_text), ends, pad, markers)  # which do not count where two are compared


@lru_cache(maxsize=32)
def _tables(
    d: Delimiters, _: tuple[Needle | None, ...], ends: Ids, pad: int | None, markers: tuple[tuple[Ids, ...], ...]
) -> Tables:
    opening, closing = d.open_text or d.open, d.close_text or d.close
    every = ((d.turn, HEADER), (d.user, USER), (d.tool, TOOL), (opening, OPEN), (closing, CLOSE))
    patterns: list[tuple[Ids | Needle, int]] = [(wanted, weight) for wanted, weight in every if wanted]
    ways, at = [], len(patterns)
    for marker in markers:
        patterns += [(ids, 0) for ids in marker]
        ways.append((at, at := at + len(marker)))
    special = {*ends, *(() if pad is None else (pad,))}
    special.update(*(_tokens_of(wanted) for wanted, _weight in patterns))
    size = max(special, default=0) + 2
    classes = torch.full((size,), _OTHER)
    rows = [_row(patterns, None, 0), _row(patterns, None, REAL)]
    known = {row: i for i, row in enumerate(rows)}
    for token in sorted(special):
        flags = REAL + PAD * (token == pad) + END * (token in ends)
        row = _row(patterns, token, flags)
        if row not in known:
            known[row] = len(rows)
            rows.append(row)
        classes[token] = known[row]
    weights = torch.tensor([weight for _, weight in patterns], dtype=torch.long)  # none, where nothing is delimited
    return Tables(classes, torch.tensor(rows), weights, *_turns(bool(d.user)), torch.tensor(1), tuple(ways))


@lru_cache(maxsize=2)
def _turns(users: bool) -> tuple[Tensor, Tensor]:
    """`turns` and `told` of `Tables`."""
    befores = [CODES * before for before in range(BEFORE)]
    following = torch.tensor(
        [
            [_turn(before, code, users, over) for before, code in product(befores, range(CODES))]
            for over in (False, True)
        ]
    )
    return following[..., :5].contiguous(), following[..., 4:].bool()


def _tokens_of(wanted: Ids | Needle) -> set[int]:
    if not isinstance(wanted, Needle):
        return set(wanted)
    holds = ((wanted.starts | wanted.inner | wanted.last) != 0) | wanted.whole
    return set(holds[:-1].nonzero()[:, 0].tolist())


def _row(patterns: Sequence[tuple[Ids | Needle, int]], token: int | None, flags: int) -> tuple[int, ...]:
    columns = zip(*(_move(wanted, token) for wanted, _ in patterns), strict=True)
    return (*(number for column in columns for number in column), flags)


def _move(wanted: Ids | Needle, token: int | None) -> tuple[int, int, int, int]:
    """What a token does to the bits of a pattern; bit 0 is always set, and stands for the text that is yet to begin."""
    if token is None:
        return 1, 0, 0, 0
    if isinstance(wanted, Needle):
        if token >= len(wanted.starts) - 1:
            return 1, 0, 0, 0
        starts, inner, length, last = (int(getattr(wanted, n)[token]) for n in ("starts", "inner", "length", "last"))
        return starts | 1, inner, length, last | int(wanted.whole[token])
    at = [i for i, own in enumerate(wanted) if own == token]
    n = len(wanted)
    starts = 1 | (2 if n > 1 and 0 in at else 0)
    return starts, sum(1 << i for i in at if 0 < i < n - 1), 1, (1 << (n - 1) if n - 1 in at else 0)


def _turn(before: int, code: int, users: bool, over: bool) -> list[int]:
    """What a row is after a token: control, phase, thinks, fresh, real, and whether the token opens a turn."""
    armed, was_over = bool(armed_of(before)), ended_of(before) or filled_of(before)
    filled = bool(code & REAL and code & PAD and was_over) or (over and bool(code & END))
    real = bool(code & REAL) and not filled
    header, opened, closed = (bool(real and code & bit) for bit in (HEADER, OPEN, CLOSE))
    user = bool(real and code & (USER | TOOL))
    opens = header and (user or armed or not users)
    phase = 0 if opens else 2 if closed else 1 if opened else phase_of(before)
    control = control_of(phase, int(not header and (user or armed)), int(filled), int(real and bool(code & END)))
    told = phase if real else -1
    return [control, told, int(told == 1), int(not opens), int(real), int(opens)]
