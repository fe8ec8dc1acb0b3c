"""A request on its way: what it asks of the model, where its tokens go, and how it may end."""

import math
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from probes.generation.sampling import Sampling
from steer.engines.serving.fired import FiredRow


class Refused(Exception):
    """A request that gets no answer, with the status it gets and the sentence that says why."""

    def __init__(self, sentence: str, *, status: int = 400, parameter: str | None = None) -> None:
        super().__init__(sentence)
        self.sentence, self.status, self.parameter = sentence, status, parameter


@dataclass(frozen=True)
class Ended:
    """A row has its last token: `stop`, by its own end, or `length`, by its limit."""

    reason: str


Piece = int | Ended | Refused  # a token, or what comes after the last one


@dataclass(frozen=True)
class Asked:
    """What the model is asked for: a prompt as token ids, how to draw, under which recipe, and how much of it."""

    prompt: tuple[int, ...]
    sampling: Sampling
    recipe: str | None = None
    strength: float = 1.0
    alone: bool = False  # its rotary frequencies would depend on who is beside it

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"The strength {self.strength} is no finite number.")


@dataclass(eq=False)
class Ticket:
    """A request in the queue. From the worker's thread, `deliver` takes its tokens one by one, and how it ended."""

    asked: Asked
    deliver: Callable[[Piece], None]
    count: int = 0
    over: bool = False
    _gone: threading.Event = field(default_factory=threading.Event)

    @property
    def group(self) -> Hashable:
        """Who may be in one batch: those of one group."""
        own, s = self.asked, self.asked.sampling
        return own.recipe, own.strength, s.temperature, s.top_p, s.top_k, s.min_p, id(self) if own.alone else 0

    @property
    def left(self) -> bool:
        """Has whoever asked gone away?"""
        return self._gone.is_set()

    def leave(self) -> None:
        """Whoever asked has gone away: the row ends at its next token."""
        self._gone.set()

    def take(self, token: int, ends: frozenset[int]) -> None:
        """The row has a token more, and perhaps its last."""
        self.count += 1
        self.deliver(token)
        if token in ends:
            self.end(Ended("stop"))
        elif self.count == self.asked.sampling.max_new_tokens:
            self.end(Ended("length"))

    def end(self, how: Ended | Refused) -> None:
        """It is over, if it was not before."""
        if not self.over:
            self.over = True
            self.deliver(how)


@runtime_checkable
class Engine(Protocol):
    """What writes the tokens of tickets. All but its own work may be called from any thread."""

    def submit(self, ticket: Ticket) -> None:
        """Raises Refused where it can take no more."""

    def touched(self) -> Future[dict[str, list[FiredRow]]]:
        """What each recipe has touched since the start."""

    def close(self) -> None:
        """Every request that is not over ends now, and no other is taken."""

    def join(self, seconds: float) -> bool:
        """Has it ended, after so many seconds at most?"""
