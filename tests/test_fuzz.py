"""Every file that is read, damaged thousands of times: it loads, or a sentence names it; nothing hangs or grows."""

import json
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from artefacts import TARGETS, Target
from mutations import mutated

from probes.files import printable, reading

SECONDS, BYTES = 5.0, 1 << 30
REFUSALS = (ValueError, TypeError, IndexError, OSError)
QUICK, LONG = 2_000, 100_000


class Hung(BaseException):
    """No reader catches it."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raises Hung after `SECONDS`; what asks for more than 4 GB beyond what there is gets a MemoryError."""

    def hung(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def outcome(target: Target, file: Path) -> str:
    """`loaded`, `refused` in a sentence that names the file, or in words what is wrong with how it was read."""
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        with bounded():
            target.read(file)
        found = "loaded"
    except REFUSALS as error:
        found, text = "refused", str(error)
        if str(file.parent) not in text:
            found = f"nameless {type(error).__name__}: {text[:300]}"
        elif printable(text) != text or len(text) > 5000:
            found = f"unprintable {type(error).__name__}: {text[:300]!r}"
    except Hung:
        found = "hung"
    except BaseException as error:  # a reader may panic in Rust, too
        if isinstance(error, KeyboardInterrupt):
            raise
        found = f"raw {type(error).__name__}: {str(error)[:300]}"
    if time.monotonic() - start > SECONDS:
        found = "hung"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    return f"grew by {grown:,} bytes" if grown > BYTES else found


def fuzz(target: Target, home: Path, times: int, seed: int = 0) -> tuple[Counter[str], dict[str, bytes]]:
    """How often each outcome came, and a file that makes each of those that are wrong."""
    folder = home / "here"
    folder.mkdir()
    file = target.build(folder)
    whole = file.read_bytes()
    assert outcome(target, file) == "loaded", outcome(target, file)
    rng, counts, examples = random.Random(f"{target.name}/{seed}"), Counter[str](), {}
    for _ in range(times):
        data = mutated(whole, target.kind, rng)
        file.write_bytes(data)
        found = outcome(target, file)
        counts[found] += 1
        if found not in ("loaded", "refused"):
            examples.setdefault(found, data)
    return counts, examples


def times(target: Target, total: int) -> int:
    """How many of `total` mutations are this target's: those that are slow to read get fewer."""
    return max(8, round(total * target.share / sum(other.share for other in TARGETS)))


def check(target: Target, home: Path, n: int) -> Counter[str]:
    counts, examples = fuzz(target, home, n)
    assert not examples, "\n".join(f"{found}\n    {data[:2000]!r}" for found, data in examples.items())
    return counts


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_what_is_read_is_refused_in_a_sentence_or_loads(target, tmp_path):
    check(target, tmp_path, times(target, QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_the_same_at_length(target, tmp_path, capsys):
    counts = check(target, tmp_path, times(target, LONG))
    with capsys.disabled():
        sys.stdout.write(f"\n{target.name}: {counts['loaded']} loaded, {counts['refused']} refused ")


def test_a_reader_without_the_wrapper_is_found(tmp_path):
    """The fuzzer goes red where one reader lets through what its parser raises."""

    def build(folder: Path) -> Path:
        (folder / "a.json").write_text('{"a": {"b": 1}}')
        return folder / "a.json"

    def raw(file: Path) -> object:
        return json.loads(file.read_bytes())["a"]["b"]

    def wrapped(file: Path) -> object:
        with reading(file, "file of a test"):
            return raw(file)

    assert fuzz(Target("wrapped", build, wrapped, "json"), _new(tmp_path / "w"), 200)[1] == {}
    assert fuzz(Target("raw", build, raw, "json"), _new(tmp_path / "r"), 200)[1] != {}


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
