"""Progress bars of generation: one for each call, or one for all calls of a job, with the time that is left."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

_JOB: ContextVar["tqdm[Any] | None"] = ContextVar("job", default=None)


@contextmanager
def progress(total: int, *, label: str) -> Iterator[None]:
    """One bar for all completions that are generated within, at most `total`; none where stderr is no terminal.

    >>> from probes import generate, load
    >>> from probes.generation import progress
    >>> with progress(3, label="two calls"):
    ...     done = generate(load("organism"), ["a 3"], samples=2), generate(load("organism"), ["a 3 b +4"])
    >>> [len(completions) for completions in done]
    [2, 1]
    """
    with tqdm(total=total, desc=label, unit="completion", delay=2, leave=False, disable=None) as bar:
        token = _JOB.set(bar)
        try:
            yield
        finally:
            _JOB.reset(token)


@contextmanager
def bar_of(total: int, missing: int, label: str) -> Iterator["tqdm[Any]"]:
    """The job's bar, or else one of its own for the completions that a call has to generate."""
    job = _JOB.get()
    if job is None:
        with tqdm(total=missing, desc=label, unit="completion", delay=2, leave=False) as bar:
            yield bar
    else:
        job.total = (job.total or 0) - (total - missing)  # what a store holds takes no time
        job.set_description(label, refresh=False)
        yield job
