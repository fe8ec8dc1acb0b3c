"""Are two answers equal as mathematics? Asked of math-verify in a process of its own, which can be stopped.

What a model writes may be `9^{9^9}`, over which sympy neither ends nor keeps within memory. One worker process is kept
warm; where it takes longer than `SECONDS`, or more than 2 GB, it is ended, and the next question starts another.
"""

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SECONDS = 1.5
START_SECONDS = 120.0
LONGEST = 2_000  # letters of an answer that are asked about


def equal_as_mathematics(gold: str, said: str) -> bool | None:
    """Whether two statements are equal, None where that could not be told within time, memory and length.

    Raises ImportError where the extra `[math]` is not installed.
    """
    if find_spec("math_verify") is None:
        raise ImportError("Mathematical answers are graded by math-verify: pip install 'thinksteer[math]'.")
    if max(len(gold), len(said)) > LONGEST:
        return _told(None, said)
    return _told(_ask(gold, said), said)


def _told(answer: bool | None, said: str) -> bool | None:
    if answer is None:
        warnings.warn(
            f"The answer {said[:60]!r} could not be graded within {SECONDS} s, 2 GB and {LONGEST:,} letters: it counts "
            "as wrong.",
            stacklevel=4,
        )
    return answer


@lru_cache(maxsize=4096)
def _ask(gold: str, said: str) -> bool | None:
    return _WORKER.ask(gold, said)


@dataclass
class _Worker:
    """The process, where there is one, and the lines that it has written."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    process: "subprocess.Popen[str] | None" = None
    lines: "queue.Queue[str]" = field(default_factory=queue.Queue)
    parent: int = 0

    def ask(self, gold: str, said: str) -> bool | None:
        with self.lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([gold, said]) + "\n")
                process.stdin.flush()
                answer: Any = self._line(SECONDS)
            except OSError:
                answer = None
            if answer is None or answer[1]:
                self.end()
                return None
            return bool(answer[0])

    def _running(self) -> "subprocess.Popen[str]":
        if self.process is not None and self.parent == os.getpid() and self.process.poll() is None:
            return self.process
        if self.parent == os.getpid():
            self.end()
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("_math_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self.parent, self.lines = os.getpid(), queue.Queue()
        threading.Thread(target=_follow, args=(self.process, self.lines), daemon=True).start()
        if self._line(START_SECONDS) != "ready":
            self.end()
            raise RuntimeError("The process that grades mathematics did not start: is math-verify whole?")
        return self.process

    def _line(self, seconds: float) -> Any:
        """What the process says next; None where it says nothing in time, or ended."""
        try:
            return json.loads(self.lines.get(timeout=seconds) or "null")
        except queue.Empty:
            return None

    def end(self) -> None:
        process, self.process = self.process, None
        if process is not None and self.parent == os.getpid():
            process.kill()
            process.wait()
            with suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()


def _follow(process: "subprocess.Popen[str]", lines: "queue.Queue[str]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    process.stdout.close()
    lines.put("")


_WORKER = _Worker()
atexit.register(_WORKER.end)
if hasattr(os, "register_at_fork"):  # a fork in the middle of a question leaves its child a lock that nobody opens
    os.register_at_fork(after_in_child=lambda: setattr(_WORKER, "lock", threading.Lock()))
