"""Where each token of a request is, told by the ids alone: the rule of `probes.thinking.Clock`, for one row.

Every delimiter and marker is found by shift-and (Baeza-Yates and Gonnet 1992): bit i of a state says that the text so
far ends with the first i parts of the pattern, and bit 0 is always set. All but a few ids do the same to the bits, so
an id has a kind, and a kind a row of moves. A state is one row of numbers, so that it can lie in a tensor of slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

Ids = tuple[int, ...]
PROMPT, THINKING, ANSWER = 0, 1, 2
PHASES = ("prompt", "thinking", "answer")
HEADER, USER, TOOL, OPEN, CLOSE = (1 << i for i in range(5))
CODES = 32
OTHER = 0  # the kind of ids that no pattern holds
CONTROL, THOUGHTS, COUNTS = 0, 1, 2  # columns of a state; behind them the counts of markers, then the bits


@dataclass(frozen=True)
class Letters:
    """A delimiter that is ordinary text, whose letters may share a token with what stands beside them: what each token
    does to its bits (starts, inner, length, last)."""

    tokens: Mapping[int, tuple[int, int, int, int]]


Pattern = Ids | Letters


@dataclass(frozen=True)
class Delimiters:
    """What opens and closes the thinking, the header of the model's turn, and those of the user's and of a tool's."""

    open: Pattern = ()
    close: Pattern = ()
    turn: Ids = ()
    user: Ids = ()
    tool: Ids = ()


@dataclass(frozen=True, eq=False)
class Machine:
    """`kinds` of ids, the last for all beyond; `moves` of each kind (starts, inner, length, last of every pattern);
    `codes` of the patterns; `ways`, the patterns of each marker; `turns` by what a row was and the code of what ends
    at the token: control, phase, thinks, fresh, opens."""

    kinds: np.ndarray
    moves: np.ndarray
    codes: np.ndarray
    ways: tuple[tuple[int, int], ...]
    turns: np.ndarray

    @classmethod
    def of(cls, d: Delimiters, markers: Sequence[tuple[Ids, ...]] = ()) -> "Machine":
        every = ((d.turn, HEADER), (d.user, USER), (d.tool, TOOL), (d.open, OPEN), (d.close, CLOSE))
        patterns: list[Pattern] = [pattern for pattern, _ in every if pattern]
        codes = [code for pattern, code in every if pattern]
        ways, at = [], len(patterns)
        for marker in markers:
            patterns += marker
            ways.append((at, at := at + len(marker)))
        codes += [0] * (len(patterns) - len(codes))
        special = sorted({token for pattern in patterns for token in _tokens_of(pattern)})
        kinds = np.full(max(special, default=0) + 2, OTHER, dtype=np.int64)
        rows = [_row(patterns, None)]
        known = {rows[0]: OTHER}
        for token in special:
            row = _row(patterns, token)
            if row not in known:
                known[row] = len(rows)
                rows.append(row)
            kinds[token] = known[row]
        moves = np.array(rows, dtype=np.int64).reshape(len(rows), 4, len(patterns))
        return cls(kinds, moves, np.array(codes, dtype=np.int64), tuple(ways), _turns(bool(d.user)))

    @property
    def width(self) -> int:
        """Numbers of a state."""
        return COUNTS + len(self.ways) + len(self.codes)

    def begin(self) -> list[int]:
        """The state of a row of which nothing was seen: a header would open a turn."""
        return [3, 0, *[0] * len(self.ways), *[1] * len(self.codes)]


@dataclass(frozen=True, eq=False)
class Told:
    """Of some tokens: phase, place in the thinking (-1 outside), and of each marker how many ended in it."""

    phase: np.ndarray
    thought: np.ndarray
    marked: np.ndarray


@dataclass(eq=False)
class Track:
    """The state of one request: a pure function of the ids read so far, so that it can be rebuilt from any prefix.

    What stands before the last header of the prompt, which ends at `turn_at`, is prompt, whatever it says.
    """

    machine: Machine
    turn_at: int = -1
    seen: int = 0
    opened: int = -1  # the last token of the last header that opened a turn

    def __post_init__(self) -> None:
        self.state = self.machine.begin()

    @classmethod
    def of(cls, machine: Machine, prompt: Sequence[int]) -> "Track":
        """That of a request with this prompt, of which nothing was read."""
        return cls(machine, last_header(machine, prompt))

    def read(self, ids: Sequence[int] | np.ndarray) -> Told:
        """Take in the next tokens, and say where they are."""
        ids, m = np.asarray(ids, dtype=np.int64), self.machine
        told = Told(*(np.zeros(shape, dtype=np.int64) for shape in (len(ids), len(ids), (len(m.ways), len(ids)))))
        kinds = m.kinds[np.minimum(ids, len(m.kinds) - 1)]
        at = 0
        for place in [*np.flatnonzero(kinds != OTHER).tolist(), len(ids)]:
            self._skip(told, at, place)
            if place < len(ids):
                self._step(told, place, m.moves[kinds[place]])
            at = place + 1
        before = max(0, min(len(ids), self.turn_at + 1 - self.seen))
        told.phase[:before], told.thought[:before], told.marked[:, :before] = PROMPT, -1, 0
        self.seen += len(ids)
        return told

    def _skip(self, told: Told, start: int, stop: int) -> None:
        """Tokens that no pattern holds."""
        if stop <= start:
            return
        state, n_ways, count = self.state, len(self.machine.ways), stop - start
        phase = state[CONTROL] % 3
        told.phase[start:stop], told.thought[start:stop] = phase, -1
        if phase == THINKING:
            told.thought[start:stop] = np.arange(state[THOUGHTS], state[THOUGHTS] + count)
            state[THOUGHTS] += count
        for i in range(n_ways):
            told.marked[i, start:stop] = state[COUNTS + i]
        state[COUNTS + n_ways :] = [1] * len(self.machine.codes)

    def _step(self, told: Told, place: int, move: np.ndarray) -> None:
        m, state, first = self.machine, self.state, COUNTS + len(self.machine.ways)
        starts, inner, length, last = move.tolist()
        bits = state[first:]
        hits = [bool(bit & end) for bit, end in zip(bits, last, strict=True)]
        state[first:] = [s | ((b & i) << n) for s, b, i, n in zip(starts, bits, inner, length, strict=True)]
        code = sum(int(c) for c, hit in zip(m.codes, hits, strict=True) if hit)
        control, phase, thinks, fresh, opens = m.turns[state[CONTROL] * CODES + code].tolist()
        state[CONTROL], state[THOUGHTS] = control, state[THOUGHTS] * fresh + thinks
        told.phase[place], told.thought[place] = phase, state[THOUGHTS] - 1 if thinks else -1
        for i, (a, b) in enumerate(m.ways):
            state[COUNTS + i] = state[COUNTS + i] * fresh + (thinks and any(hits[a:b]))
            told.marked[i, place] = state[COUNTS + i]
        if opens:
            self.opened = self.seen + place


def last_header(machine: Machine, prompt: Sequence[int] | np.ndarray) -> int:
    """Where the last header of the prompt ends that opened a turn; -1 where there is none."""
    track = Track(machine)
    track.read(prompt)
    return track.opened


def _turns(users: bool) -> np.ndarray:
    return np.array([_turn(before, code, users) for before, code in product(range(6), range(CODES))], dtype=np.int64)


def _turn(before: int, code: int, users: bool) -> list[int]:
    """`before` is the phase, and 3 more where a header would open a turn."""
    armed, header, user = before >= 3, bool(code & HEADER), bool(code & (USER | TOOL))
    opens = header and (user or armed or not users)
    phase = PROMPT if opens else ANSWER if code & CLOSE else THINKING if code & OPEN else before % 3
    armed = not header and (user or armed)
    return [phase + 3 * armed, phase, int(phase == THINKING), int(not opens), int(opens)]


def _tokens_of(pattern: Pattern) -> set[int]:
    return set(pattern.tokens) if isinstance(pattern, Letters) else set(pattern)


def _row(patterns: Sequence[Pattern], token: int | None) -> tuple[int, ...]:
    moves = [_move(pattern, token) for pattern in patterns]
    return tuple(number for column in zip(*moves, strict=True) for number in column)


def _move(pattern: Pattern, token: int | None) -> tuple[int, int, int, int]:
    if token is None:
        return 1, 0, 0, 0
    if isinstance(pattern, Letters):
        starts, inner, length, last = pattern.tokens.get(token, (0, 0, 0, 0))
        return starts | 1, inner, length, last
    at, n = [i for i, own in enumerate(pattern) if own == token], len(pattern)
    starts = 1 | (2 if n > 1 and 0 in at else 0)
    return starts, sum(1 << i for i in at if 0 < i < n - 1), 1, (1 << (n - 1) if n - 1 in at else 0)
