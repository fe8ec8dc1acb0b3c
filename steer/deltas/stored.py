"""Weight deltas as folders: tensors, low-rank factors, or the names of the checkpoints they are sums of."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from probes.files import staged_folder
from steer.checkpoints.checkpoint import WHOLE, Checkpoint, Shard, blocks
from steer.checkpoints.stream import Piece, ShardPlan, header_of, stream
from steer.deltas.delta import WeightDelta
from steer.deltas.opened import WORDS, open_delta

_SHARD = 4_000_000_000
_OVERSAMPLE, _ITERATIONS = 8, 4


def save(
    delta: WeightDelta,
    folder: str | Path,
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    linked: bool = False,
) -> WeightDelta:
    """Write the delta to a new folder, and give it as it was written.

    Numbers are rounded to `dtype`. With `rank`, each matrix that gets smaller by it is its truncated SVD (randomised,
    Halko et al. 2011), and `Stored.kept_energy` says what that keeps. `linked` writes only which checkpoints and
    adapters it is a sum of, with their fingerprints: sums are then made from these, in float64.
    Raises ValueError, FileExistsError, OSError.

    >>> from steer.deltas import open_delta, save
    >>> delta = save(open_delta("organism-rl").selected(only=["self_attn"]), "delta", rank=4)
    >>> round(delta.terms[0].source.kept_energy(), 2)
    0.76
    >>> open_delta("delta").names == delta.names
    True
    """
    if rank is not None and (linked or rank < 1):
        raise ValueError("A rank is 1 or more, and belongs to a delta that is stored: a linked one holds no tensors.")
    if dtype not in WHOLE.values():
        known = ", ".join(str(known)[6:] for known in WHOLE.values())
        raise ValueError(f"A delta is stored in {known}, not in {str(dtype)[6:]}.")
    about = {
        "stored": not linked,
        "made_of": delta.made_of,
        "notes": list(delta.notes),
        "rank": rank,
        "vocabulary": delta.vocabulary,
        "tied": delta.tied,
        "config": dict(delta.config),
    }
    if linked:
        about["made_of"] = [_absolute(words) for words in delta.made_of]
        text = yaml.safe_dump(about, sort_keys=False)
        with staged_folder(Path(folder)) as stage:
            (stage / WORDS).write_text(text, encoding="utf-8")
            if open_delta(stage).made_of != about["made_of"]:
                raise ValueError(f"{stage / WORDS} was not written as it was meant: read back, it is another delta.")
        return open_delta(folder)
    plans, text = _plans(delta, rank, dtype), yaml.safe_dump(about, sort_keys=False)
    job = {"made_of": delta.made_of, "rank": rank, "dtype": str(dtype)}
    stream(folder, plans, job, lambda made: _finish(made, text))
    return open_delta(folder)


def dtype_named(name: str) -> torch.dtype:
    """A dtype that a delta is stored in, by its name. Raises ValueError for another.

    >>> from steer.deltas import dtype_named
    >>> dtype_named("bfloat16")
    torch.bfloat16
    """
    for known in WHOLE.values():
        if str(known) == f"torch.{name}":
            return known
    raise ValueError(f"{name!r} is no dtype that a delta is stored in: float32, bfloat16 or float16.")


def _absolute(words: Mapping[str, Any]) -> dict[str, Any]:
    """Folders by their whole path: a link is to hold wherever it is followed from."""
    kind = next((key for key in ("checkpoint", "adapter", "delta") if key in words), None)
    if kind is None:
        raise ValueError("A null or an edit is no file, so it cannot be linked: store it.")
    place = Path(words[kind])
    return {**words, kind: str(place.resolve() if place.is_dir() else place)}


@dataclass(frozen=True, eq=False)
class _Part:
    """A tensor to be stored: its name there, its shape, and its numbers."""

    name: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Tensor]]
    dtype: torch.dtype = torch.float32

    @property
    def entry(self) -> tuple[str, str, tuple[int, ...]]:
        return self.name, next(word for word, known in WHOLE.items() if known == self.dtype), self.shape

    @property
    def piece(self) -> Piece:
        return Piece(self.bytes, lambda: (_finite(chunk.to(self.dtype), self.name) for chunk in self.chunks()))

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def _plans(delta: WeightDelta, rank: int | None, dtype: torch.dtype) -> list[ShardPlan]:
    groups: list[list[_Part]] = [[]]
    for name in delta.names:
        parts = _parts(delta, name, rank, dtype)
        if groups[-1] and sum(part.bytes for part in (*groups[-1], *parts)) > _SHARD:
            groups.append([])
        groups[-1] += parts
    if len(groups) == 1:
        files = ["delta.safetensors"]
    else:
        files = [f"delta-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return [
        ShardPlan(file, header_of([part.entry for part in group]), tuple(part.piece for part in group))
        for file, group in zip(files, groups, strict=True)
    ]


def _parts(delta: WeightDelta, name: str, rank: int | None, dtype: torch.dtype) -> list[_Part]:
    shape = delta.shape(name)

    def whole() -> Iterator[Tensor]:
        for rows in blocks(shape):
            yield delta.block(name, rows)

    if rank is None or len(shape) != 2 or rank * sum(shape) >= shape[0] * shape[1]:
        return [_Part(name, shape, whole, dtype)]

    @lru_cache(maxsize=1)  # the three parts are written one after the other
    def factors() -> tuple[Tensor, Tensor, Tensor]:
        return _truncated(_finite(delta.tensor(name), name), rank)

    def last() -> Iterator[Tensor]:
        yield factors()[2]
        factors.cache_clear()

    return [
        _Part(f"{name}@up", (shape[0], rank), lambda: iter([factors()[0]]), dtype),
        _Part(f"{name}@down", (rank, shape[1]), lambda: iter([factors()[1]]), dtype),
        _Part(f"{name}@energy", (2,), last),
    ]


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """up and down with up @ down ≈ matrix, and Σ σ² kept and in all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + _OVERSAMPLE, *matrix.shape), niter=_ITERATIONS)
    u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    return u * s, v.T.contiguous(), torch.stack([s.double().square().sum(), matrix.double().square().sum()]).float()


def _finite(block: Tensor, name: str) -> Tensor:
    if not bool(block.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not finite: nothing was written.")
    return block


def _finish(made: Path, text: str) -> None:
    files = sorted(made.glob("delta*.safetensors"))
    if len(files) > 1:
        _write_index(made, files)
    (made / WORDS).write_text(text, encoding="utf-8")
    Checkpoint.open(made, stem="delta")


def _write_index(made: Path, files: Sequence[Path]) -> None:
    named = {place.name: file.name for file in files for place in Shard.open(file).places}
    words = {"metadata": {"total_size": sum(file.stat().st_size for file in files)}, "weight_map": named}
    (made / "delta.safetensors.index.json").write_text(json.dumps(words, indent=1), encoding="utf-8")
