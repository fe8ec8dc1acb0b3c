"""The queue of requests: the oldest is next, and those that may share its batch go with it."""

import threading
from collections.abc import Hashable
from itertools import islice, takewhile

from steer.engines.serving.tickets import Refused, Ticket

LONGEST = 1024  # requests that may wait
ENDING = "The server is shutting down. Ask again when it is up."


class Waiting:
    """Requests that have no row yet, in the order they came. Any thread may put one in; the worker takes them out."""

    def __init__(self) -> None:
        self._tickets: list[Ticket] = []
        self._changed = threading.Condition()
        self.closed, self._woken = False, False

    def put(self, ticket: Ticket) -> None:
        """Raises Refused where the queue is full, or shut."""
        with self._changed:
            if self.closed:
                raise Refused(ENDING, status=503)
            if len(self._tickets) >= LONGEST:
                raise Refused(f"{LONGEST} requests wait already. Ask again later.", status=503)
            self._tickets.append(ticket)
            self._changed.notify()

    def wake(self) -> None:
        """Let the worker look up, where it waits."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def close(self) -> list[Ticket]:
        """Nobody comes in any more; those who were waiting."""
        with self._changed:
            self.closed, found, self._tickets = True, self._tickets, []
            self._changed.notify()
        return found

    def first(self, size: int) -> list[Ticket]:
        """The oldest, and others of its group, which may be younger than some of another; none where something else
        wakes the worker."""
        with self._changed:
            if not (self._next() or self.closed or self._woken):
                self._changed.wait()
            self._woken = False
            rows = self._next()
            return self._out(list(islice((t for t in rows if t.group == rows[0].group), size)))

    def could_join(self, group: Hashable) -> bool:
        """May one join a batch of this group? Only if it is the oldest of all: else a batch that never ends would keep
        the others waiting."""
        with self._changed:
            rows = self._next()
            return bool(rows) and rows[0].group == group

    def joining(self, group: Hashable, size: int) -> list[Ticket]:
        """Those who join a batch of this group, each older than everyone of another."""
        with self._changed:
            return self._out(list(islice(takewhile(lambda t: t.group == group, self._next()), size)))

    def __len__(self) -> int:
        return len(self._tickets)

    def _next(self) -> list[Ticket]:
        """Those who are still there."""
        self._tickets = [ticket for ticket in self._tickets if not ticket.left]
        return self._tickets

    def _out(self, taken: list[Ticket]) -> list[Ticket]:
        self._tickets = [ticket for ticket in self._tickets if ticket not in taken]
        return taken
