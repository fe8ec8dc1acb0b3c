"""What workers of Ray gain on one machine: the same spans read by one plain process, by one worker and by two.

A worker has one thread, and so has the plain process; the plain one reads the batches that are the workers' shards, so
that all arms do the same sums, and their results are compared bit by bit. A round runs every arm once, in an order
drawn anew, by the wall's clock; ratios are taken within rounds. Starting is timed apart, once. The peak of a worker is
the high-water mark of its resident set, as Linux counts it. A kill comes half way through a reading of its own.

This is a measurement of processes on a CPU: it says nothing of GPUs, or of several machines.

    GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1 python benchmarks/scaling.py [model]
"""

import json
import os
import random
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from threading import Timer

import numpy as np
import torch
from rich.console import Console
from timing import in_words, ratio, timed

from probes import Site, Span, load, record
from probes.activations import Recorded, _record
from probes.model import sites_in
from probes.scaling import Workers, pools
from probes.scaling.reader import source_of
from probes.tables import Table

ROUNDS, TEXTS, POS, SHARD = 5, 32, 128, 512


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    torch.set_num_threads(1)
    _record.BATCH_TOKENS = SHARD
    model = load(name)
    rng, top = random.Random(0), min(1000, model.config.vocab_size)
    spans = [Span(tuple(rng.randrange(3, top) for _ in range(POS)), 0, POS) for _ in range(TEXTS)]
    sites = sites_in(model, "resid_post")
    source = source_of(name, dtype="float32", delimiters=None, revision=None, device=None, cpus=1)
    load_average, started = os.getloadavg(), {}
    import ray

    before = time.perf_counter()
    ray.init(address="local", num_cpus=3, object_store_memory=pools.OBJECTS, include_dashboard=False,
             log_to_driver=False, logging_level="ERROR")  # fmt: skip
    started["Ray"] = time.perf_counter() - before
    with ExitStack() as stack:
        workers = {}
        for n in (1, 2):
            before = time.perf_counter()
            pool = stack.enter_context(pools.actors(source, n, 0, None))
            started[f"{n} worker{'s' * (n > 1)}"] = time.perf_counter() - before
            workers[n] = Workers(source, pool, SHARD, None)
        here = stack.enter_context(pools.here(source, 0))
        arms = {
            "plain": lambda: record(model, spans, sites),
            "spread, 1 worker: this process": lambda: Workers(source, here, SHARD, None).record(spans, sites),
            "1 worker of Ray": lambda: workers[1].record(spans, sites),
            "2 workers of Ray": lambda: workers[2].record(spans, sites),
        }
        equal = {arm: same(run(), arms["plain"]()) for arm, run in arms.items()}
        seconds = timed(arms, ROUNDS)["wall"]
        peaks = {f"{n}": [peak_of(pid) for pid in one.pids()] for n, one in workers.items()}
        killed = with_a_kill(workers[2], spans, sites, float(np.median(seconds["2 workers of Ray"])) / 2)
        equal["2 workers of Ray, one killed"] = same(killed.pop("found"), arms["plain"]())
    ray.shutdown()
    tokens = TEXTS * POS
    facts = {
        "model": name, "cores": os.cpu_count(), "tokens": tokens, "shards": TEXTS * POS // SHARD, "rounds": ROUNDS,
        "load_average": load_average, "started_seconds": started,
        "tokens_per_second": {arm: tokens / float(np.median(own)) for arm, own in seconds.items()},
        "throughput_over_plain": {arm: ratio(seconds["plain"] / own) for arm, own in seconds.items() if arm != "plain"},
        "equal_to_the_bit": equal, "peak_mb_of_workers": peaks, "one_killed": killed,
    }  # fmt: skip
    rows = tuple(
        (arm, per_second, in_words(facts["throughput_over_plain"][arm]) if arm != "plain" else "1", equal[arm])
        for arm, per_second in facts["tokens_per_second"].items()
    )
    columns = ("arm", "tokens a second", "over plain [95 %]", "equal to the bit")
    Console(width=140).print(Table(columns, rows, f"{name}, {os.cpu_count()} cores"))
    print(json.dumps(facts))


def with_a_kill(workers: Workers, spans: list[Span], sites: list[Site], after: float) -> dict:
    """The seconds of a reading in which one worker is killed; the other reads on while a third loads the model."""
    victim, before = workers.pids()[0], time.perf_counter()
    Timer(after, os.kill, (victim, signal.SIGKILL)).start()
    found = workers.record(spans, sites)
    return {"seconds": time.perf_counter() - before, "killed_after": after, "found": found}


def same(found: dict[Site, Recorded], wanted: dict[Site, Recorded]) -> bool:
    return all(
        torch.equal(getattr(found[site], part).total, getattr(wanted[site], part).total)
        for site in wanted
        for part in ("activation", "norm", "share")
    )


def peak_of(pid: int) -> float:
    """MB, of Linux alone."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


if __name__ == "__main__":
    main()
