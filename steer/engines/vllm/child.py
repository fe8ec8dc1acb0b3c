"""A server in a process of its own: its lines are passed on, and it ends when we do."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

_KEPT = 400  # lines
_GENTLY, _AT_ONCE = 5.0, 2.0  # seconds: to end by itself, and once it is killed
_DEATH = 1  # PR_SET_PDEATHSIG
_AHEAD = re.compile(r"^(\x1b\[[\d;]*m)*(\([^)]*pid=\d+\)\s*)?(\x1b\[[\d;]*m)*((ERROR|CRITICAL)\s.*?\]\s*)?")
_NAMED = re.compile(r"^(?:(?:[\w.]+\.)?\w*(?:Error|Exception|Refused): |Value error, )")
_DETAILS = re.compile(r" \[type=.*$")  # of pydantic
_EMPTY = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "Engine core proc",
    "EngineCore encountered",
)


class Child:
    """A process, in a group of its own, so that all that it starts can be ended with it."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], tell: Callable[[str], object] | None = None
    ) -> None:
        self.lines: deque[str] = deque(maxlen=_KEPT)
        self.tell = _to_stderr if tell is None else tell
        self.process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            preexec_fn=_dying_with_us(),
        )
        self._reader = threading.Thread(target=self._read, name="lines of vLLM", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def check(self, when: str, *, patience: float = 0.0) -> None:
        """Raise ValueError where it has ended, or ends in so many seconds, with what it said last."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        if not self.alive:
            self._reader.join(_AT_ONCE)
            raise ValueError(f"vLLM ended {when}, with exit status {self.process.returncode}: {reason_of(self.lines)}")

    def end(self) -> None:
        """It is asked to, and after some seconds made to, with all that it started."""
        if self.alive:
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_GENTLY)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(_AT_ONCE)
        self._reader.join(_AT_ONCE)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self.tell(line)


def _to_stderr(line: str) -> None:
    with suppress(OSError, ValueError):  # who listened has gone
        sys.stderr.write(line)
        sys.stderr.flush()


def reason_of(lines: Sequence[str] | deque[str]) -> str:
    """The last error that says something; or else the last lines."""
    plain = [_AHEAD.sub("", line).strip() for line in lines]
    told = [line for line in plain if _NAMED.match(line) and not any(word in line for word in _EMPTY)]
    told = told or [line for line in plain if ": error: " in line]  # of the parser of options
    if told:
        text = _DETAILS.sub("", _NAMED.sub("", told[-1]))
        return text if text.endswith(".") else f"{text}."
    last = " / ".join([line for line in plain if line][-3:])
    return f"its last lines are: {last}" if last else "it said nothing."


class Told(BaseException):
    """A signal says that it is time to end."""


@contextmanager
def signals_end() -> Iterator[None]:
    """TERM and INT raise `Told` in the block, once: what is done for the end is not cut short by a second one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = (signal.SIGTERM, signal.SIGINT)

    def tell(number: int, frame: object) -> None:  # noqa: ARG001
        for name in names:
            signal.signal(name, signal.SIG_IGN)
        raise Told

    before = {name: signal.signal(name, tell) for name in names}
    try:
        yield
    finally:
        for name, own in before.items():
            signal.signal(name, own)


def wait_for(ready: Callable[[], bool], child: Child, *, every: float = 0.25) -> None:
    """Until it is ready. Raises ValueError where the child ends before."""
    while not ready():
        child.check("before it was ready")
        time.sleep(every)


def _dying_with_us() -> Callable[[], None] | None:
    """What the child does first: it asks for a TERM at our end, whatever ends us. Linux alone can."""
    if sys.platform != "linux":
        return None
    library, ours = ctypes.CDLL(None), os.getpid()

    def ask() -> None:
        library.prctl(_DEATH, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != ours:  # it was too late
            os.kill(os.getpid(), signal.SIGTERM)

    return ask
