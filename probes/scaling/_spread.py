"""Share one reading out among workers, and add up what they found, shard by shard."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from hashlib import sha256
from operator import add
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from probes.activations._record import BATCH_TOKENS, Recorded
from probes.activations.experts import ExpertCounts
from probes.fields import plain
from probes.generation.completions import Completion
from probes.model.delimiters import Delimiters
from probes.model.sites import Site
from probes.scaling.pools import Job, Pool, actors, here
from probes.scaling.reader import Source, source_of
from probes.scaling.saving import load_counts, load_recorded, save_statistics
from probes.scaling.shards import shards_of_completions, shards_of_spans
from probes.tables import Brief
from probes.thinking.spans import Span

Moment = dict[Site, Recorded]
S = TypeVar("S", Moment, ExpertCounts)


@contextmanager
def spread(
    model: str | Path | PreTrainedModel,
    workers: int,
    *,
    cpus: int = 1,
    gpus: float = 0,
    shard_tokens: int = BATCH_TOKENS,
    store: Path | None = None,
    dtype: str | None = None,
    delimiters: tuple[str, str] | Delimiters | None = None,
    revision: str | None = None,
    address: str | None = None,
) -> Iterator["Workers"]:
    """While open, workers that read, each with the model in a process of its own: actors of Ray *(Moritz et al. 2018)*.

    Each loads the model by its name, a hub id, a folder, a GGUF file or an embedded one; a model that is loaded already
    is named, and its fingerprint must be theirs. A worker has `cpus` threads, and a share `gpus` of a GPU. Shards are
    the batches of at most `shard_tokens` padded tokens that one process would read, and are added up in their order: so
    the sums are the same to the bit for any number of workers, and those of `record` and `read_experts` with as many
    threads, where all frequencies of positions are fixed. A worker that dies loses its shard, which another reads.
    With a `store`, a folder, each shard's statistics are kept, and what is there is not read again. One worker is this
    process, and needs no Ray. `address` is that of a cluster of Ray; without it the Ray that runs is taken, or one is
    started for the block.

    Raises ImportError where Ray is not installed, ValueError where there is no room for so many workers, or no process
    can load the model by name, and ChildProcessError where one shard ends three workers.

    >>> from probes import Site, generate, load
    >>> from probes.scaling import spread
    >>> from probes.thinking import thinking
    >>> completions = generate(load("organism"), ["a 3 b +4 c *7", "a 5 b -2 c +9"])
    >>> with spread("organism", workers=1) as workers:  # 2 and more want Ray
    ...     found = workers.record([thinking(c) for c in completions], [Site(2, "resid_post")])
    >>> found[Site(2, "resid_post")].activation
    Moments(count=2, total=Tensor[96])
    """
    for name, value in (("workers", workers), ("cpus", cpus), ("shard_tokens", shard_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}, and must be at least 1.")
    if gpus < 0:
        raise ValueError(f"gpus is {gpus:g}, and must be 0 or more.")
    device = "cuda:0" if gpus else None
    source = source_of(model, dtype=dtype, delimiters=delimiters, revision=revision, device=device, cpus=cpus)
    alone = workers == 1 and address is None
    with here(source, gpus) if alone else actors(source, workers, gpus, address) as pool:
        yield Workers(source, pool, shard_tokens, None if store is None else Path(store))


@dataclass(frozen=True, eq=False, repr=False)
class Workers(Brief):
    """Workers that have loaded a model, and read what they are given: see `spread`.

    >>> from probes import generate, load
    >>> from probes.activations import read_experts
    >>> from probes.scaling import spread
    >>> model = load("organism")
    >>> completions = generate(model, ["a 3 b +4 c *7", "a 5 b -2 c +9"])
    >>> with spread(model, workers=1) as workers:
    ...     counts = workers.count_experts(completions)
    >>> bool((counts.counts == read_experts(model, completions).total().counts).all())
    True
    """

    source: Source
    pool: Pool
    shard_tokens: int
    store: Path | None

    def record(self, spans: Sequence[Span], sites: Sequence[Site], *, keep_sinks: bool = False) -> dict[Site, Recorded]:
        """`probes.record` over all spans. Raises ValueError where there is no span or no site."""
        if not spans or not sites:
            raise ValueError("Activations are read of spans at sites, but there is none.")
        shards = shards_of_spans(spans, self.shard_tokens)
        jobs: list[Job] = [(shard, tuple(sites), keep_sinks) for shard in shards]
        found = self._shards("record", jobs, list(map(len, shards)), load_recorded, ("reading", "span"))
        return reduce(lambda a, b: {site: a[site] + b[site] for site in sites}, found)

    def count_experts(self, completions: Sequence[Completion], markers: Sequence[str] = ()) -> ExpertCounts:
        """`probes.activations.read_experts` over all completions, added up. Raises ValueError where there is none, and
        for a family whose routers cannot be read."""
        if not completions:
            raise ValueError("Experts are read off completions, but there is none.")
        shards = shards_of_completions(completions, self.shard_tokens)
        jobs: list[Job] = [(shard, tuple(markers)) for shard in shards]
        words = ("reading experts", "completion")
        return reduce(add, self._shards("count", jobs, list(map(len, shards)), load_counts, words))

    def head_writes(
        self, spans: Sequence[Span], vectors: Mapping[int, Float[Tensor, " d_model"]]
    ) -> Float[Tensor, "n_layers n_heads"]:
        """`probes.head_writes` over all spans: what `o_proj` reads is recorded by all workers, and projected by one."""
        layers = self._once("layers_to_read", tuple(vectors))
        found = self.record(spans, [Site(layer, "z") for layer in layers])
        inputs = {layer: found[Site(layer, "z")].activation.mean for layer in layers}
        writes: Tensor = self._once("writes", inputs, {layer: vector.cpu() for layer, vector in vectors.items()})
        return writes

    def pids(self) -> list[int]:
        """The processes that read; of one worker, this one."""
        return self.pool.pids()

    def _once(self, method: str, *job: Any) -> Any:
        ((_, found),) = self.pool.run(method, [job])
        return found

    def _shards(
        self,
        method: str,
        jobs: Sequence[Job],
        sizes: Sequence[int],
        load: Callable[[Path], S],
        words: tuple[str, str],
    ) -> Iterator[S]:
        """The statistics of each shard, in the order of the shards: kept already, or read now."""
        kept = {} if self.store is None else {n: self.store / self._name(method, job) for n, job in enumerate(jobs)}
        missing = [number for number in range(len(jobs)) if number not in kept or not kept[number].exists()]
        done = self.pool.run(method, [jobs[number] for number in missing])
        ready, held = set(range(len(jobs))) - set(missing), dict[int, S]()
        with tqdm(total=sum(sizes), desc=words[0], unit=words[1], delay=2, leave=False) as bar:
            bar.update(sum(sizes) - sum(sizes[number] for number in missing))
            for number in range(len(jobs)):
                if number in ready:
                    yield load(kept[number])
                    continue
                while number not in held:
                    at, found = next(done)
                    held[missing[at]] = found
                    if kept:
                        save_statistics(kept[missing[at]], found)
                    bar.update(sizes[missing[at]])
                yield held.pop(number)

    def _name(self, method: str, job: Job) -> str:
        """A checksum of all that the statistics of a shard follow from."""
        told = plain([self.source, self.pool.identity, method, job])
        return f"{sha256(json.dumps(told).encode()).hexdigest()[:24]}.safetensors"
