"""Weight deltas as folders: tensors, low-rank factors, or the names of the checkpoints they are sums of."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from probes.files import check_keys, staged_folder
from probes.tables import Brief
from probes.texts import read_yaml
from steer.checkpoints.checkpoint import WHOLE, Checkpoint, Shard, blocks
from steer.checkpoints.stream import Piece, ShardPlan, header_of, stream
from steer.deltas.delta import DeltaSource, Term, WeightDelta, path_of_source
from steer.deltas.lora import Adapter, Factors

WORDS = "delta.yaml"
SHIPPED = {f"organism-{kind}": Path(__file__).parent / "shipped" / kind for kind in ("rl", "sft", "target")}
_KEYS = ("stored", "made_of", "notes", "rank", "vocabulary", "tied", "config")
_SHARD = 4_000_000_000
_OVERSAMPLE, _ITERATIONS = 8, 4
_PARTS = ("@up", "@down", "@energy")


@dataclass(frozen=True, eq=False, repr=False)
class Stored(Brief):
    """A delta that `save` wrote: each tensor whole, or as `NAME@up` [rows, rank] times `NAME@down` [rank, width].

    >>> from steer.deltas import open_delta
    >>> stored = open_delta("organism-rl").terms[0].source
    >>> stored.words["delta"], len(stored.names), round(stored.kept_energy(), 2)
    ('organism-rl', 151, 0.98)
    """

    folder: Path
    checkpoint: Checkpoint
    about: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.partition("@")[0] for name in self.checkpoint.places))

    @property
    def vocabulary(self) -> str | None:
        out: str | None = self.about["vocabulary"]
        return out

    @property
    def tied(self) -> bool | None:
        out: bool | None = self.about["tied"]
        return out

    @property
    def config(self) -> Mapping[str, Any]:
        out: Mapping[str, Any] = self.about["config"]
        return out

    @property
    def words(self) -> dict[str, Any]:
        shipped = next((name for name, folder in SHIPPED.items() if folder == self.folder), None)
        return {"delta": shipped or str(self.folder), "fingerprint": self.checkpoint.fingerprint}

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.checkpoint.places:
            return self.checkpoint.shape(name)
        return self.checkpoint.shape(f"{name}@up")[0], self.checkpoint.shape(f"{name}@down")[1]

    def block(self, name: str, rows: slice) -> Float[Tensor, "rows width"]:
        if name in self.checkpoint.places:
            return self.checkpoint.block(name, rows)
        up, down = (self.checkpoint.read(name + part) for part in _PARTS[:2])
        return Factors(up, down).block(rows)

    def kept_energy(self) -> float:
        """Share of Σ Δ² over the factored tensors that their factors keep; 1 where none is factored."""
        parts = [n for n in self.checkpoint.places if n.endswith("@energy")]
        kept, whole = sum((self.checkpoint.read(n).double() for n in parts), torch.zeros(2).double()).tolist()
        return kept / whole if whole else 1.0


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


def open_delta(folder: str | Path) -> WeightDelta:
    """A delta of ours, a PEFT LoRA adapter, or one of `SHIPPED` by name (see `steer.training.donors`).

    Raises FileNotFoundError for anything else, ValueError for a link to what changed.

    >>> from steer.deltas import open_delta
    >>> delta = open_delta("organism-target")
    >>> len(delta.names), delta.names[0]
    (151, 'lm_head.weight')
    """
    folder = Path(folder) if Path(folder).is_dir() else SHIPPED.get(str(folder), Path(folder))
    if (folder / "adapter_config.json").is_file():
        adapter = Adapter.open(folder)
        return WeightDelta((Term(1.0, adapter, frozenset(adapter.names)),), adapter.notes)
    if not (folder / WORDS).is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {WORDS} nor adapter_config.json: it is no weight delta. Shipped are "
            f"{', '.join(SHIPPED)}."
        )
    about = read_yaml(folder / WORDS)
    check_keys(about, _KEYS, str(folder / WORDS))
    if about["stored"]:
        stored = Stored(folder, Checkpoint.open(folder, stem="delta"), about)
        return WeightDelta((Term(1.0, stored, frozenset(stored.names)),), tuple(about["notes"]))
    return WeightDelta(tuple(_linked(words) for words in about["made_of"]), tuple(about["notes"]))


def _linked(words: Mapping[str, Any]) -> Term:
    kind = next(key for key in ("checkpoint", "adapter", "delta") if key in words)
    place = words[kind]
    source: DeltaSource = Checkpoint.open(place) if kind == "checkpoint" else open_delta(place).terms[0].source
    if source.words["fingerprint"] != words["fingerprint"]:
        raise ValueError(f"{path_of_source(source)} is not what it was when the delta was made: make it again.")
    names = source.names if words["names"] is None else words["names"]
    return Term(float(words["weight"]), source, frozenset(names))


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
