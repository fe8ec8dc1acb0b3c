"""The engine over our own generation: one thread that takes requests out of a queue and writes them side by side."""

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count

from transformers import PreTrainedModel

from probes.generation._batch import Batch, end_ids
from probes.generation.engine import Row
from probes.generation.settings import counts_steps, one_draw_a_token
from steer.engines.serving.fired import Fired, FiredRow
from steer.engines.serving.handing import Handing
from steer.engines.serving.tickets import Refused, Ticket
from steer.engines.serving.waiting import ENDING, Waiting
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied
from steer.runtime.calibration import scaled
from steer.runtime.firelog import FireLog

_LIFE = 8192  # passes of a batch that others may join: a log remembers each


class Worker:
    """Writes requests under recipes, `size` rows at a time at most. Which are side by side changes no answer."""

    def __init__(self, model: PreTrainedModel, recipes: Mapping[str, Recipe], size: int) -> None:
        self.model, self.recipes, self.size = model, dict(recipes), size
        self.waiting, self.fired = Waiting(), Fired(recipes)
        self._handing: Handing | None = None
        self._log: tuple[str, FireLog] | None = None
        self._asked: deque[Future[dict[str, list[FiredRow]]]] = deque()
        self._numbers, self._passes = count(), 0
        self._thread = threading.Thread(target=self._run, name="steer serve", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Raises Refused where it can take no more."""
        self.waiting.put(ticket)

    @property
    def live(self) -> int:
        """How many rows are being written."""
        handing = self._handing
        return 0 if handing is None else len(handing.live)

    def touched(self) -> "Future[dict[str, list[FiredRow]]]":
        """What each recipe has touched since the start, told by the worker between two tokens."""
        told: Future[dict[str, list[FiredRow]]] = Future()
        self._asked.append(told)
        self.waiting.wake()
        return told

    def close(self) -> None:
        """Every request that is not over ends now, and no other is taken."""
        waiting, handing = self.waiting.close(), self._handing
        for ticket in (*waiting, *(() if handing is None else list(handing.tickets.values()))):
            ticket.end(Refused(ENDING, status=503))

    def join(self, seconds: float) -> bool:
        """Has the thread ended, after so many seconds at most?"""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with one_draw_a_token(self.model):
            while not self.waiting.closed:
                tickets = self.waiting.first(self.size)
                self._tell()
                if tickets:
                    self._write_or_say_why(tickets)

    def _write_or_say_why(self, tickets: list[Ticket]) -> None:
        """Whatever goes wrong is told to those it went wrong for, and the others are served."""
        self._handing = handing = Handing(tuple(end_ids(self.model)))
        why = Refused(ENDING, status=503)  # to those who are not answered, if nothing went wrong
        try:
            self._write(tickets, handing)
        except Exception as error:  # noqa: BLE001 - the server goes on
            why = Refused(_sentence(error), status=500)
        finally:
            self._handing = None
            for ticket in (*tickets, *handing.tickets.values()):
                ticket.end(why)

    def _write(self, tickets: list[Ticket], handing: Handing) -> None:
        """A batch, from its first row to its last; others join it as they come."""
        first, group = tickets[0].asked, tickets[0].group
        most = max(ticket.asked.sampling.max_new_tokens for ticket in tickets)
        sampling = replace(first.sampling, seed=0, max_new_tokens=most)
        with self._under(first.recipe, first.strength), ExitStack() as listening:
            batch = Batch(self.model, sampling, handing, object(), listening)
            batch.open(self._rows(tickets, handing))
            joins, self._passes = batch.turns and not counts_steps(self.model) and not first.alone, 0

            def pause() -> bool:
                self._tell()
                self._passes += 1
                room = joins and self._passes < _LIFE and len(handing.live) < self.size
                return self.waiting.closed or (room and self.waiting.could_join(group))

            while batch.part is not None:
                batch.run_on(0, pause)
                if self.waiting.closed:
                    return
                room = self.size - batch.live if joins and self._passes < _LIFE else 0
                batch.turn(self._rows(self.waiting.joining(group, room), handing), trim=joins)

    def _rows(self, tickets: list[Ticket], handing: Handing) -> list[Row]:
        rows = []
        for ticket in tickets:
            number, own = next(self._numbers), ticket.asked
            handing.tickets[number] = ticket
            rows.append(Row(number, str(number), 0, own.prompt, own.sampling.seed, own.sampling.max_new_tokens))
        return rows

    @contextmanager
    def _under(self, name: str | None, strength: float) -> Iterator[None]:
        if name is None:
            yield
            return
        recipe = self.recipes[name] if strength == 1 else scaled(self.recipes[name], strength)
        with applied(self.model, recipe, must_fire=False) as log:
            self._log = name, log
            try:
                yield
            finally:
                self._log = None
                self.fired.add(name, log)

    def _tell(self) -> None:
        """Answer those who asked what was touched."""
        while self._asked:
            told = self._asked.popleft()
            if told.set_running_or_notify_cancel():
                told.set_result(self.fired.rows(self._log))


def _sentence(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return "The device has too little memory for this batch. Start the server with a smaller --max-batch."
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"The model failed: {type(error).__name__}: {text}"
