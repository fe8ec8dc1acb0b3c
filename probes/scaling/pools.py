"""Where readers run: in this process, or as actors of Ray, one model each; a job whose actor dies goes to another."""

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch

from probes.scaling.reader import Identity, Reader, Source

Job = tuple[Any, ...]  # the arguments of a method of `Reader`
DEATHS = 3  # of actors by one job, one after the other, before it is given up
OBJECTS = 200 << 20  # bytes that a Ray of our own keeps for what is passed


@runtime_checkable
class Pool(Protocol):
    """Readers that have loaded the same model."""

    @property
    def identity(self) -> Identity:
        """Which model that is."""
        ...

    def run(self, method: str, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        """Do each job once; gives its number and its result, as they come."""
        ...

    def pids(self) -> list[int]:
        """The processes that read."""
        ...


@contextmanager
def here(source: Source, gpus: float) -> Iterator[Pool]:
    """One reader in this process, with as many threads as a worker has."""
    check_room(1, source.cpus, gpus, cores=os.cpu_count() or 1, devices=_devices(gpus))
    threads = torch.get_num_threads()
    try:
        yield _Here(Reader(source))
    finally:
        torch.set_num_threads(threads)


class _Here:
    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.identity = reader.load()

    def run(self, method: str, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        for number, job in enumerate(jobs):
            yield number, getattr(self._reader, method)(*job)

    def pids(self) -> list[int]:
        return [os.getpid()]


@contextmanager
def actors(source: Source, workers: int, gpus: float, address: str | None) -> Iterator[Pool]:
    """Readers as actors of Ray: of a cluster at `address`, of the Ray that runs here, or of one started and stopped.

    Raises ImportError where Ray is not installed, and ValueError where it has no room for so many.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("Several workers are actors of Ray: pip install 'thinksteer[ray]'.") from error
    joined = ray.is_initialized()
    if not joined:
        if address is None:
            check_room(workers, source.cpus, gpus, cores=os.cpu_count() or 1, devices=_devices(gpus))
        _begin(ray, workers * source.cpus, address)
    try:
        told = ray.cluster_resources()
        check_room(workers, source.cpus, gpus, cores=told.get("CPU", 0), devices=told.get("GPU", 0))
        pool = _Actors(ray, source, workers, gpus)
        try:
            pool.start()
            yield pool
        finally:
            pool.stop()
    finally:
        if not joined:
            ray.shutdown()


def check_room(workers: int, cpus: int, gpus: float, *, cores: float, devices: float) -> None:
    """Raise ValueError for more workers than there is room for."""
    for each, there, what in ((cpus, cores, "core"), (gpus, devices, "GPU")):
        if workers * each > there:
            raise ValueError(
                f"{workers} {'workers' if workers > 1 else 'worker'} with {each:g} {what}{'s' * (each > 1)} each "
                f"{'need' if workers > 1 else 'needs'} {workers * each:g}, and there "
                f"{'is' if there == 1 else 'are'} {there:g}: take fewer."
            )


def _devices(gpus: float) -> int:
    return torch.cuda.device_count() if gpus else 0


def _begin(ray: Any, cores: int, address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report itself to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what it will do one day, and warns of
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        ray.init(address=address, **quiet)
        return
    ray.init(address="local", num_cpus=cores, object_store_memory=OBJECTS, include_dashboard=False, **quiet)


class _Actors:
    """A job is with one actor at a time, and its result is taken once: where the actor dies, the job is done anew by
    another."""

    def __init__(self, ray: Any, source: Source, workers: int, gpus: float) -> None:
        self._ray, self._workers, self._source = ray, range(workers), source
        self._kind = ray.remote(num_cpus=source.cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Reader)
        self._actors: list[Any] = [None for _ in self._workers]
        self._identity: Identity | None = None

    @property
    def identity(self) -> Identity:
        assert self._identity is not None
        return self._identity

    def pids(self) -> list[int]:
        pids: list[int] = self._ray.get([actor.pid.remote() for actor in self._actors])
        return pids

    def start(self) -> None:
        for _ in self._run("load", [], [], {self._replaced(worker): (worker, None) for worker in self._workers}):
            raise AssertionError("Nothing but loading was asked for.")

    def stop(self) -> None:
        for actor in self._actors:
            if actor is not None:
                self._ray.kill(actor)

    def run(self, method: str, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        yield from self._run(method, jobs, list(self._workers), {})

    def _run(
        self, method: str, jobs: Sequence[Job], idle: list[int], running: dict[Any, tuple[int, int | None]]
    ) -> Iterator[tuple[int, Any]]:
        """`running` says which worker has which job, None where it loads its model."""
        from ray.exceptions import RayError, RayTaskError

        waiting, deaths = deque(range(len(jobs))), Counter[int | None]()
        while waiting or running:
            while waiting and idle:
                worker, number = idle.pop(), waiting.popleft()
                running[getattr(self._actors[worker], method).remote(*jobs[number])] = worker, number
            (done, *_), _ = self._ray.wait(list(running), num_returns=1)
            worker, job = running.pop(done)
            try:
                result = self._ray.get(done)
            except RayTaskError as error:
                raise (error.cause or error) from error  # what the reader raised, as it did
            except RayError as error:  # the process is gone, or its machine
                deaths[job] += 1
                if deaths[job] >= DEATHS:
                    raise ChildProcessError(_gave_up(job, len(jobs), error)) from error
                if job is not None:
                    waiting.appendleft(job)
                running[self._replaced(worker)] = worker, None
                continue
            idle.append(worker)
            if job is None:
                self._check(result)
            else:
                yield job, result

    def _replaced(self, worker: int) -> Any:
        """A new actor, and what it will say when it has loaded its model."""
        actor = self._actors[worker] = self._kind.remote(self._source)
        return actor.load.remote()

    def _check(self, found: Identity) -> None:
        self._identity = self._identity or found
        if found != self._identity:
            raise ValueError(
                f"Two workers loaded two models by the name {self._source.name!r} (their fingerprints are "
                f"{self._identity.fingerprint} and {found.fingerprint}): give a name that is the same everywhere."
            )


def _gave_up(job: int | None, jobs: int, error: Exception) -> str:
    what = "while it loaded the model" if job is None else f"over shard {job + 1} of {jobs}"
    kind = type(error).__name__
    return (
        f"{DEATHS} workers died one after the other {what} ({kind}): there may be too little memory. Give fewer "
        "workers, or a smaller shard_tokens."
    )
