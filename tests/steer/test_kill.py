"""A killed run leaves nothing that passes for a result, and the same command run again ends with the same bytes.

Children are forked from this process, so that a kill costs a second and not an import of torch. Half of the kills fall
anywhere in a run, half after it has begun to write its result; the moments are drawn with a seed. A kill seldom falls
into a write, so that the system also ends runs at a byte that is drawn: where a file may grow no further.
"""

import contextlib
import os
import random
import resource
import select
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from tqdm.std import TqdmDefaultWriteLock

from probes.generation.completions import read_completions
from probes.model.loading import load
from probes.model.sites import Site
from steer.cli.main import app
from steer.folding._export import export
from steer.folding.export_lora import export_adapter
from steer.interventions.activation import Ablate
from steer.recipes.recipe import Recipe

pytestmark = pytest.mark.slow
LONGEST = 120.0  # seconds that no run here takes


@dataclass(frozen=True)
class Job:
    """A command that writes one output, its name, how many kills it has to survive, and what it keeps beside."""

    run: Callable[[Path], object]
    output: str
    kills: int
    kept: str = ""


def steer(*words):
    """The command, in this process."""
    app([str(word) for word in words], standalone_mode=False)


def generated(output, split="probe"):
    steer("generate", "organism", "-o", output, "-n", 160, "--batch-size", 16, "--split", split)


def directed(output, texts):
    there = ("--positive", texts / "probe.jsonl", "--negative", texts / "select.jsonl", "--site", "L2.resid_post")
    steer("direction", "organism", *there, "-o", output)


def swept(output, texts):
    there = ("--positive", texts / "probe.jsonl", "--negative", texts / "select.jsonl", "--site", "L2.resid_post")
    sizes = ("--n-select", 96, "--n-report", 160, "--batch-size", 16, "--draws", 1)
    steer("sweep", "organism", *there, "-o", output, *sizes, "--strength", -0.5, "--strength", 0.5)


def edited(output):
    sizes = ("-n", 60, "--n-probe", 200, "--batch-size", 16, "--control-draws", 1)
    steer("thinkedit", "organism", "-o", output, "--heads", 2, "--kind", "replace", *sizes)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    texts = tmp_path_factory.mktemp("texts")
    for split in ("probe", "select"):
        assert attempt(Job(partial(generated, split=split), f"{split}.jsonl", 0), texts / f"{split}.jsonl").status == 0
    model = load("organism")
    vector = torch.randn(96, generator=torch.Generator().manual_seed(2))
    recipe = Recipe.of(model, [Ablate(Site(0, "result", head), vector, target=0.7) for head in (1, 2)])
    return {
        "generate": Job(generated, "completions.jsonl", 30),
        "direction": Job(partial(directed, texts=texts), "direction.safetensors", 20),
        "sweep": Job(partial(swept, texts=texts), "swept", 20, "swept.completions"),
        "thinkedit": Job(edited, "edited", 12, "edited.completions"),
        "export": Job(lambda folder: export(model, recipe, folder), "edited", 25),
        "adapter": Job(lambda folder: export_adapter(model, recipe, folder), "adapter", 25),
    }


NAMES = ["generate", "direction", "sweep", "thinkedit", "export", "adapter"]
STORING = ("generate", "sweep", "thinkedit")


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_bytes(name, jobs, tmp_path):
    job, rng, seen = jobs[name], random.Random(name), Counter()
    calm, timing = undisturbed(job, tmp_path)
    while seen["killed"] < job.kills:
        output = tmp_path / str(seen["rounds"]) / job.output
        for _ in range(4):
            seen["killed"] += killed(job, output, timing, rng)
            seen.update(check(output, calm, job))
            if seen["killed"] == job.kills or contents(output) == contents(calm):
                break
        finish(job, output, calm)
        seen["rounds"] += 1
    assert seen["stores in part" if name in STORING else "killed"] > 0
    assert seen["rests"] > 0 or name in ("direction", *STORING)  # those write in a moment


@pytest.mark.parametrize("name", NAMES)
def test_ended_at_any_byte_and_run_again_it_ends_with_the_same_bytes(name, jobs, tmp_path):
    job, rng, seen = jobs[name], random.Random(name), Counter()
    calm, _ = undisturbed(job, tmp_path)
    written = (calm, *calm.rglob("*"), *(calm.parent / job.kept).rglob("*"))
    sizes = [path.stat().st_size for path in written if path.is_file() and path.stat().st_size]
    for turn in range(10):
        output = tmp_path / str(turn) / job.output
        end = attempt(job, output, largest=rng.randrange(rng.choice(sizes)))
        assert end.status == -signal.SIGXFSZ, end.words
        seen.update(check(output, calm, job))
        finish(job, output, calm)
    assert seen["cut lines" if name in STORING else "rests"] > 0


def undisturbed(job, folder):
    """The output of a run that nobody disturbs, and how the run went."""
    output = folder / "calm" / job.output
    timing = attempt(job, output)
    assert timing.status == 0, timing.words
    return output, timing


def finish(job, output, calm):
    """Run the job again to its end: the bytes are those of the undisturbed run, and nothing else lies there."""
    if not output.is_dir():  # else the kill came too late, and the output is refused as it should be
        last = attempt(job, output)
        assert last.status == 0, last.words
    assert contents(output) == contents(calm)
    assert not job.kept or contents(output.parent / job.kept) == contents(calm.parent / job.kept)
    assert {path.name for path in output.parent.iterdir()} == {job.output, job.kept or job.output}


@dataclass(frozen=True)
class Attempt:
    """The exit status of a run (below 0: a signal), its words, and when it began to write its result and when it ended,
    in seconds."""

    status: int
    words: str
    began: float
    ended: float


def killed(job, output, timing, rng):
    """One run with one kill; whether the kill was in time."""
    if rng.random() < 0.5:
        end = attempt(job, output, after=rng.uniform(0, timing.ended))
    else:
        end = attempt(job, output, after=rng.uniform(0, timing.ended - timing.began), writing=True)
    assert end.status in (0, -signal.SIGKILL), end.words
    return end.status == -signal.SIGKILL


def attempt(job, output, *, after=LONGEST, writing=False, largest=resource.RLIM_INFINITY):
    """Run the job in a process of its own, where no file may be larger than `largest` bytes.

    Kill it `after` so many seconds: from its start, or from where it begins `writing`.
    """
    output.parent.mkdir(exist_ok=True)
    heard, said = os.pipe()
    start, log = time.monotonic(), output.parent.parent / "log"
    child = os.fork()
    if child == 0:
        _be(job, output, said, log, largest)
    os.close(said)
    began = start
    if writing or after == LONGEST:
        if select.select([heard], [], [], LONGEST)[0]:
            os.read(heard, 1)
        began = time.monotonic()
    select.select([heard], [], [], after)  # readable once the child has ended, and with it the pipe
    os.kill(child, signal.SIGKILL)  # not reaped yet, so the number is the child's
    os.close(heard)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Attempt(status, log.read_text(), began - start, time.monotonic() - start)


def _be(job, output, said, log, largest):
    """The child: it does the job, says when it makes the first stage, and never returns."""
    make, told = tempfile.mkdtemp, []

    def telling(*args, **kwargs):
        if not told:
            told.append(os.write(said, b"."))
        return make(*args, **kwargs)

    tempfile.mkdtemp, status = telling, 1
    for part in ("acquire", "release"):  # all forks share tqdm's lock: killed with it in hand, one would stop them all
        setattr(TqdmDefaultWriteLock, part, lambda *_, **__: True)
    with contextlib.suppress(BaseException):
        words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(words, stream)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # python's own way is an error that can be caught
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        try:
            job.run(output)
            status = 0
        except BaseException:
            os.write(words, traceback.format_exc().encode())
    os._exit(status)


def contents(path):
    """The bytes of a file; of a folder, those of its files by name; None where there is neither."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return path.read_bytes() if path.is_file() else None


def check(output, calm, job):
    """What lies there after a kill: a whole result or none, stores of whole completions, and stages of this output."""
    seen, kept = Counter(), output.parent / job.kept
    if output.suffix == ".jsonl":
        check_store(output, calm, seen)
    else:
        assert contents(output) in (None, contents(calm))
    for store in kept.rglob("[!.]*.jsonl") if job.kept else ():
        if store.parent.name.endswith(".partial"):
            continue  # a stage, and no store
        check_store(store, calm.parent / store.relative_to(output.parent), seen)
    rests = [path.name for path in output.parent.iterdir() if path not in (output, kept)]
    assert all(name.startswith(f".{output.name}.") and name.endswith(".partial") for name in rests)
    seen["rests"] += bool(rests)
    return seen


def check_store(store, calm, seen):
    """All that it holds is whole, once, and what an undisturbed run writes."""
    if not store.exists():
        return
    wanted = {(c.id, c.sample): c for c in read_completions(calm)}
    held = read_completions(store)
    assert all(wanted[c.id, c.sample] == c for c in held)
    assert len({(c.id, c.sample) for c in held}) == len(held)
    seen["stores in part"] += len(held) < len(wanted)
    seen["cut lines"] += not store.read_bytes().endswith(b"\n")
