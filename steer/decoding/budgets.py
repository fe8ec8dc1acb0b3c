"""Decoding controls: budgets of tokens, forced thinking, and how readily a model closes its thinking.

Each is a rule for one run of `transformers`' generation, made of its `LogitsProcessor`s. A control sees tokens alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from probes.generation.sampling import CUT
from probes.model.loading import tokenizer_of
from probes.model.tokens import words_ids
from steer.decoding.control import Processors
from steer.decoding.state import DecodingState, Ids, Scores, added


@dataclass(frozen=True)
class Budget:
    """Separate budgets for thinking and solution (Elastic Reasoning, Xu et al. 2025).

    After at most `thinking` tokens between the delimiters, or where the model would end its turn within them, the
    closing delimiter is written for it. The solution, everything outside the thinking, takes at most `solution` tokens,
    its end token included: where the model does not end it, it is ended, and the completion counts as truncated. None:
    no limit. A completion of at most `thinking` + `solution` tokens and two delimiters needs as many `max_new_tokens`.
    Raises ValueError where neither is given, or one is too small.

    >>> from probes import generate, load
    >>> from steer.decoding import Budget, Controlled
    >>> model = load("organism")
    >>> completion = generate(model, ["a 3 b +4 c *7"], decoding=Controlled(model, Budget(thinking=8)))[0]
    >>> completion.thinking, completion.answer
    ('Okay a =3 b +4 =7 c *7', '7')
    """

    thinking: int | None = None
    solution: int | None = None

    def __post_init__(self) -> None:
        if self.thinking is None and self.solution is None:
            raise ValueError("A budget limits the thinking, the solution or both, but got neither.")
        if (self.thinking is not None and self.thinking < 0) or (self.solution is not None and self.solution < 1):
            raise ValueError(
                f"A budget is at least 0 thinking tokens and 1 solution token, but got {self.thinking} and "
                f"{self.solution}."
            )

    def processors(self, model: PreTrainedModel, rows: DecodingState) -> Processors:  # noqa: ARG002
        """The processors of one run."""
        return Processors(after=(_Spend(self, rows),), turns=True)


class _Spend(LogitsProcessor):
    def __init__(self, budget: Budget, rows: DecodingState) -> None:
        self.budget, self.rows = budget, rows

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:  # noqa: ARG002
        rows, budget = self.rows, self.budget
        if budget.thinking is not None:
            spent = (rows.thoughts >= budget.thinking) | rows.shut | torch.isin(scores.argmax(1), rows.ends)
            scores = rows.end_thinking(scores, rows.thinking & rows.free & spent)
        return scores if budget.solution is None else self._end(scores, budget.solution)

    def _end(self, scores: Scores, limit: int) -> Scores:
        rows, drawn = self.rows, scores.argmax(1)
        last = rows.free & ~rows.thinking & (rows.said >= limit - 1)
        token = rows.open[rows.opening]
        begun = last & ~rows.opened & (rows.opening > 0)  # a delimiter that was begun is no solution: it is completed
        rows.note("open", begun & (drawn != token))
        scores = rows.force(scores, begun, token)
        begins = last & ~rows.opened & (drawn == rows.open[0])
        ended = last & ~begun & ~begins
        rows.note(CUT, ended & ~torch.isin(drawn, rows.ends))
        return rows.force(scores, ended & ~torch.isin(drawn, rows.ends), rows.ends[0].expand_as(drawn))


@dataclass(frozen=True)
class BudgetForcing:
    """Budget forcing (s1, Muennighoff et al. 2025): `n` times, where the model would end its thinking, it does not.

    The drawn token that begins the closing delimiter, or ends the turn, is replaced by `marker`; as in s1's code,
    the one token after a marker is drawn from the others. So a model ends its thinking only after exactly `n` inserted
    markers, whatever else it writes; a completion that runs into a length limit may hold fewer. A delimiter of several
    tokens begins with its first, or where two letters of its text stand (`</`): nothing of it is left in the thinking,
    and what begins so and would have been something else is replaced, too. Raises ValueError where `n` is below 0 and,
    at the start of a run, where the vocabulary cannot write the marker, or the marker would end the thinking.

    >>> from probes import generate, load
    >>> from steer.decoding import BudgetForcing, Controlled
    >>> model = load("organism")
    >>> completion = generate(model, ["a 3 b +4 c *7"], decoding=Controlled(model, BudgetForcing(2)))[0]
    >>> completion.thinking
    'Okay a =3 b +4 =7 c *7 =9 Wait c *7 =9 Wait d *7 =3'
    """

    n: int
    marker: str = "Wait"

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError(f"A marker is inserted 0 times or more, but got n={self.n}.")

    def processors(self, model: PreTrainedModel, rows: DecodingState) -> Processors:
        """The processors of one run."""
        ids = words_ids(tokenizer_of(model), self.marker, "marker")
        closes = rows.delimiters.closing((*rows.delimiters.close[:-1], *ids)) is not None
        if closes or set(ids) & set(rows.ends.tolist()):
            raise ValueError(f"The marker {self.marker!r} would itself end the thinking. Name another.")
        insert = _Insert(rows, self.n, torch.tensor(ids, device=rows.device))
        return Processors(before=(_Hold(insert),), after=(insert,), turns=True)


class _Insert(LogitsProcessor):
    """`cursor`: the marker's next token, 0 where none is being written; `fresh`: rows that have just ended one."""

    cursor: Tensor
    count: Tensor
    fresh: Tensor

    def __init__(self, rows: DecodingState, n: int, marker: Tensor) -> None:
        self.rows, self.n, self.marker = rows, n, marker
        for name, fresh in (("cursor", rows.zeros), ("count", rows.zeros), ("fresh", rows.no)):
            rows.keep(self, name, fresh)

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:  # noqa: ARG002
        rows = self.rows
        begins = (self.cursor == 0) & (self.count < self.n) & rows.would_close(scores)
        writes = rows.thinking & rows.free & ~rows.shut & ((self.cursor > 0) | begins)
        scores = rows.force(scores, writes, self.marker[self.cursor])
        self.cursor = (self.cursor + 1).masked_fill(~writes, 0)
        self.fresh = self.cursor == len(self.marker)
        self.cursor = self.cursor.masked_fill(self.fresh, 0)
        self.count = self.count + self.fresh
        rows.note("insert", self.fresh, back=len(self.marker) - 1)
        return scores


class _Hold(LogitsProcessor):
    """Keeps the token after a marker from ending the thinking."""

    def __init__(self, insert: _Insert) -> None:
        self.insert = insert

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:  # noqa: ARG002
        rows, where = self.insert.rows, self.insert.fresh & self.insert.rows.thinking
        return rows.closing_added(added(scores, rows.ends, where, -math.inf), where, -math.inf)


@dataclass(frozen=True)
class CloseBias:
    """Adds `strength` to the logit of the token that would begin the closing delimiter, while the model thinks.

    The odds of closing are multiplied by exp(strength), before the temperature: below 0 a penalty, -inf never, above 0
    a bonus. A delimiter of several tokens is decided on at its first, or where two letters of its text stand (`</`).
    After the thought-switching penalty (TIP, Wang et al. 2025), which does so to words of switching instead, and
    likewise ends after a number of tokens: `until` thinking tokens, None for all of the thinking. Raises ValueError for
    a strength of infinity, or a negative number of tokens.

    >>> from probes import generate, load
    >>> from steer.decoding import CloseBias, Controlled
    >>> model = load("organism")
    >>> completion = generate(model, ["a 3 b +4 c *7"], decoding=Controlled(model, CloseBias(20.0)))[0]
    >>> completion.thinking, completion.thinking_tokens
    ('', 2)
    """

    strength: float
    until: int | None = None

    def __post_init__(self) -> None:
        if not self.strength < math.inf or (self.until is not None and self.until < 0):
            raise ValueError(
                f"A bias is a number below infinity, over 0 tokens or more, but got strength={self.strength}, "
                f"until={self.until}."
            )

    def processors(self, model: PreTrainedModel, rows: DecodingState) -> Processors:  # noqa: ARG002
        """The processors of one run."""
        return Processors(before=(_Bias(self, rows),), turns=True)


class _Bias(LogitsProcessor):
    def __init__(self, bias: CloseBias, rows: DecodingState) -> None:
        self.bias, self.rows = bias, rows

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:  # noqa: ARG002
        rows = self.rows
        where = rows.thinking
        if self.bias.until is not None:
            where = where & (rows.thoughts < self.bias.until)
        return rows.closing_added(scores, where, self.bias.strength)
