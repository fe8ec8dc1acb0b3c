"""Where each row of a batch is while it is being written: in its thinking or not, and how far."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.generation.sampling import Event
from probes.model.delimiters import Delimiters
from probes.needles import Needle
from probes.thinking.phases import Clock

Ids = Int[Tensor, "batch pos"]
Scores = Float[Tensor, "batch d_vocab"]
Where = Bool[Tensor, " batch"]

_THINKING, _ANSWER = 1, 2


class DecodingState:
    """State of one run, a number or a truth for each row, on the device; nothing is copied to the host before `events`.

    The thinking is that of `probes.model.tokens.thinking_span`: from the first opening delimiter of the turn to the
    closing one after it. What is written before or after it is solution, a second block of thinking included.

    - `opened`, `closed`, `done`: the thinking has begun, has ended, the row has ended; `thinking`: it is in between.
    - `thoughts`: tokens generated since the thinking was opened. `said`: tokens generated outside the thinking, since
      it was closed or, until it is opened, since the row began.
    - `opening`, `closing`: how many tokens of that delimiter have just been written, less than all (letters, where it
      is found by its text); `open` and `close`: the token that goes on from there.
    - `shut`: the closing delimiter is being written for the row. `taken`: its next token is decided; who comes later
      leaves it alone.
    - `step`: the number of the token that is being decided.

    >>> import torch
    >>> from probes.model import Delimiters
    >>> from steer.decoding import DecodingState
    >>> state = DecodingState(Delimiters(open=(3,), close=(4,)), ends=[2], mask=torch.ones(1, 2, dtype=torch.long))
    >>> for n in (2, 3, 4, 5):  # the prompt, then three tokens, of which the first opens the thinking
    ...     state.follow(torch.tensor([[6, 7, 3, 8, 9]])[:, :n])
    >>> state.thinking, state.thoughts
    (tensor([True]), tensor([2]))
    """

    def __init__(self, delimiters: Delimiters, ends: Sequence[int], mask: Int[Tensor, "batch pos"]) -> None:
        self.delimiters, self.mask = delimiters, mask
        opens, closes = delimiters.open_text, delimiters.close_text
        self.open, self.close, self.ends = (
            torch.tensor(ids, device=mask.device)
            for ids in (
                delimiters.open if opens is None else opens.writes,
                delimiters.close if closes is None else closes.writes,
                ends,
            )
        )
        self._clock = Clock(delimiters)
        self._events: list[tuple[str, int, Where]] = []
        self.opened, self.closed, self.done, self.taken, self.shut, self._told = (
            torch.zeros(len(mask), dtype=torch.bool, device=mask.device) for _ in range(6)
        )
        self.thoughts, self.said, self.opening, self.closing = (
            torch.zeros(len(mask), dtype=torch.long, device=mask.device) for _ in range(4)
        )
        self.step = 0

    @property
    def thinking(self) -> Where:
        """Rows that are in their thinking."""
        return self.opened & ~self.closed & ~self.done

    @property
    def free(self) -> Where:
        """Rows that go on, and whose next token nobody has decided."""
        return ~self.done & ~self.taken

    def follow(self, ids: Ids) -> None:
        """Take in the prompts at the first call, the newest token of each row after it."""
        width = self.mask.shape[1]
        self.step, self.taken = ids.shape[1] - width, torch.zeros_like(self.taken)
        if self.step == 0:
            self._begin(ids)
        else:
            self._advance(ids)
        d = self.delimiters
        opening, _ = _partial(ids, d.open, d.open_text)
        closing, self._bits = _partial(ids, d.close, d.close_text)
        self.opening, self.closing = opening.masked_fill(self.opened, 0), closing.masked_fill(~self.thinking, 0)

    def _begin(self, ids: Ids) -> None:
        phase = self._clock.advance(ids, self.mask, 0).phase
        self.opened = phase[:, -1] == _THINKING
        if self.delimiters.turn:  # else a block that is closed may belong to an earlier turn
            self.opened = (phase == _THINKING).any(1)
            self.closed = self.opened & (phase[:, -1] == _ANSWER)

    def _advance(self, ids: Ids) -> None:
        phase = self._clock.advance(ids[:, -1:], None, ids.shape[1] - 1).phase[:, -1]
        live, thought = ~self.done, self.thinking
        self.opened = self.opened | (phase == _THINKING)
        self.thoughts = self.thoughts + thought
        self.said = (self.said + (live & ~thought)).masked_fill(~thought & self.thinking, 0)
        self.closed = self.closed | (self.opened & (phase == _ANSWER))
        self.done = self.done | torch.isin(ids[:, -1], self.ends)

    def would_close(self, scores: Scores) -> Where:
        """Rows whose drawn token ends their thinking: it completes the closing delimiter, or ends the row."""
        drawn = scores.argmax(1)
        if (needle := self.delimiters.close_text) is None:
            completes = (drawn == self.close[-1]) & (self.closing == len(self.close) - 1)
        else:
            completes = needle.completed(self._bits, drawn)
        return self.thinking & (completes | torch.isin(drawn, self.ends))

    def closing_added(self, scores: Scores, where: Where, amount: float) -> Scores:
        """`amount` added, in some of the rows, to the tokens that would complete the closing delimiter."""
        if (needle := self.delimiters.close_text) is None:
            return added(scores, self.close[-1:], where & (self.closing == len(self.close) - 1), amount)
        completes = needle.completing(self._bits, scores.shape[1]) & (where & self.thinking)[:, None]
        return torch.where(completes, scores + amount, scores)

    def force(self, scores: Scores, where: Where, token: Int[Tensor, " batch"]) -> Scores:
        """These rows write this token."""
        self.taken = self.taken | where
        only = torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)
        return only.where(where[:, None], scores)

    def end_thinking(self, scores: Scores, where: Where) -> Scores:
        """These rows write the closing delimiter, token by token from now on, or the rest of it."""
        token = self.close[self.closing]
        overruled = where & (scores.argmax(1) != token)
        self.note("close", overruled & ~self._told)
        self._told, self.shut = self._told | overruled, self.shut | where
        return self.force(scores, where, token)

    def note(self, kind: str, where: Where, *, back: int = 0) -> None:
        """Something was done to these rows, at the token being decided or `back` tokens before it."""
        self._events.append((kind, self.step - back, where))

    def events(self) -> list[tuple[Event, ...]]:
        """Of each row what was noted, in the order of the tokens."""
        if not self._events:
            return [()] * len(self.mask)
        rows = torch.stack([where for _, _, where in self._events]).cpu().T.tolist()
        noted = [(kind, at) for kind, at, _ in self._events]
        return [
            tuple(sorted((e for e, hit in zip(noted, row, strict=True) if hit), key=lambda event: event[1]))
            for row in rows
        ]


def added(scores: Scores, tokens: Tensor, where: Where, amount: float) -> Scores:
    """`amount` added to the scores of some tokens in some rows."""
    logits = scores[:, tokens]
    return scores.index_copy(1, tokens, torch.where(where[:, None], logits + amount, logits))


def _partial(
    ids: Ids, wanted: tuple[int, ...], needle: Needle | None
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """How many tokens of `wanted`, from its first on but not all, end each row; of a text, how many letters, and the
    bits that say so."""
    if needle is not None:
        bits = needle.ending(ids)
        return needle.partial(bits), bits
    found = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    for n in range(1, min(len(wanted), ids.shape[1] + 1)):
        hit = torch.stack([ids[:, i - n] == token for i, token in enumerate(wanted[:n])]).all(0)
        found = found.masked_fill(hit, n)
    return found, found
