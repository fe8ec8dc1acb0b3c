"""A Hugging Face checkpoint on disk, read tensor by tensor: its names, shapes and dtypes come without its data."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from jaxtyping import Float
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from probes.files import inside, reading
from probes.model.embedded import resolve
from probes.tables import Brief
from probes.texts import parse_json, read_json

WHOLE: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
COUNTS: dict[str, torch.dtype] = {  # buffers: carried along, never summed
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "BOOL": torch.bool,
}
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
_PACKED_NAMES = (".qweight", ".qzeros", ".weight_packed", ".absmax", ".quant_map")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `dtype` in the words of safetensors, bytes `begin` to `end` of the data of its shard.

    >>> from steer.checkpoints import TensorInfo
    >>> TensorInfo("lm_head.weight", "BF16", (69, 96), begin=0, end=13248).bytes
    13248
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """How many bytes of the file it takes."""
        return self.end - self.begin


@dataclass(frozen=True, eq=False, repr=False)
class Shard(Brief):
    """One safetensors file. `header` is all that lies before the data; `places` are in the order of the data."""

    path: Path
    header: bytes
    places: tuple[TensorInfo, ...]

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Raises FileNotFoundError where it is not there, ValueError where it is not whole."""
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} lacks its shard {path.name}: fetch or copy the checkpoint again.")
        with reading(path, "safetensors file"):
            with safe_open(path, framework="pt"):  # checks the header, its offsets, and the size of the file
                pass
            with path.open("rb") as file:
                length = file.read(8)
                header = length + file.read(int.from_bytes(length, "little"))
            return cls(path, header, places_in(header, str(path)))

    @cached_property
    def file(self) -> Any:
        """Opened for as long as the shard lives; what it gives is mapped, not read into memory."""
        return safe_open(self.path, framework="pt")

    def fingerprint(self) -> str:
        """A checksum over the header, the size, and 64 evenly spaced pieces of 4 kB."""
        size = self.path.stat().st_size
        digest = hashlib.sha256(self.header + str(size).encode())
        with self.path.open("rb") as file:
            for i in range(64):
                file.seek((size - 4096) * i // 63 if size > 4096 else 0)
                digest.update(file.read(4096))
        return digest.hexdigest()


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint(Brief):
    """The shards of one folder, and the words of its config. Nothing of a tensor is read before it is asked for.

    >>> from steer.checkpoints import Checkpoint
    >>> checkpoint = Checkpoint.open("organism")
    >>> checkpoint.shape("lm_head.weight"), checkpoint.config["model_type"]
    ((69, 96), 'qwen3_moe')
    >>> checkpoint.read("model.norm.weight").dtype
    torch.float32
    """

    name: str
    folder: Path
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    index: Path | None

    @classmethod
    def open(
        cls, source: str | Path, *, revision: str | None = None, stem: str = "model", download: bool = True
    ) -> "Checkpoint":
        """A local folder, a hub id, or a name that `probes.load` knows; without `download`, what is here of the hub.

        Every file has to lie in the folder: an index or a link that leads outside it is refused, as are shards that
        are missing, truncated, or that hold other tensors than the index says, and weights that are quantised.
        Raises ValueError or FileNotFoundError.
        """
        folder = _folder(source, revision, download)
        with reading(folder, "checkpoint"):
            return cls._read(str(source), folder, stem)

    @classmethod
    def _read(cls, name: str, folder: Path, stem: str) -> "Checkpoint":
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        named: dict[str, str] | None = None
        if not os.path.lexists(single):  # transformers, too, takes the single file where there are both
            if not index.is_file():
                raise FileNotFoundError(f"{folder} holds no {stem}.safetensors, nor an index of its shards.")
            named = weight_map(index)
        files = [single.name] if named is None else sorted(set(named.values()))
        shards = tuple(Shard.open(inside(folder, file)) for file in files)
        if named is not None:
            _check_index(index, named, shards)
        path = folder / "config.json"
        config = _config(inside(folder, path.name)) if os.path.lexists(path) else {}
        checkpoint = cls(name, folder, shards, config, None if named is None else index)
        checkpoint._check_whole()
        return checkpoint

    @cached_property
    def places(self) -> dict[str, tuple[Shard, TensorInfo]]:
        """Each tensor by its name: the shard that holds it, and where."""
        return {place.name: (shard, place) for shard in self.shards for place in shard.places}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors that can be summed, tied embeddings once: a tied head is the embedding, whether stored or not."""
        return tuple(
            name
            for name, (_, place) in self.places.items()
            if place.dtype in WHOLE and not (self.tied and name.endswith(HEADS))
        )

    @property
    def tied(self) -> bool:
        """One matrix for embedding and head: there is no head on disk, or the config says so."""
        return bool(self.config.get("tie_word_embeddings")) or not any(name.endswith(HEADS) for name in self.places)

    @cached_property
    def vocabulary(self) -> str:
        """A checksum of the tokenizer's tokens with their ids; empty where the folder has no tokenizer.json."""
        path = self.folder / "tokenizer.json"
        if not os.path.lexists(path):
            return ""
        with reading(path, "tokenizer"):
            tokens = Tokenizer.from_file(str(inside(self.folder, path.name))).get_vocab(with_added_tokens=True)
        return vocabulary_of(tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Tells checkpoints apart; it is no proof of origin, since it reads 256 kB of each shard."""
        return hashlib.sha256("".join(shard.fingerprint() for shard in self.shards).encode()).hexdigest()[:16]

    @property
    def words(self) -> dict[str, Any]:
        """What is noted of a checkpoint elsewhere: its name and fingerprint."""
        return {"checkpoint": self.name, "fingerprint": self.fingerprint}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, read from the header alone."""
        return self.places[name][1].shape

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from its file: its pages are read when they are touched, and belong to no process."""
        out: Tensor = self.places[name][0].file.get_tensor(name)
        return out

    def block(self, name: str, rows: slice) -> Float[Tensor, "rows width"]:
        """Some rows of the tensor as a matrix, to be read alone: the last axis is the width; a vector is a column."""
        return as_rows(self._mapped(name))[rows]

    @cached_property
    def _mapped(self) -> Callable[[str], Tensor]:
        """`read`, of which the last few stay mapped: a tensor is read block by block, and to map it anew costs more."""
        return lru_cache(maxsize=16)(self.read)

    def _check_whole(self) -> None:
        method = self.config.get("quantization_config")
        if method is not None:
            named = method.get("quant_method", "?") if isinstance(method, Mapping) else method
            raise ValueError(
                f"{self.folder} is quantised ({named}): its numbers are codes, and sums of codes mean nothing. "
                "Give the checkpoint it was quantised from."
            )
        for name, (_, place) in self.places.items():
            if (place.dtype not in WHOLE and place.dtype not in COUNTS) or name.endswith(_PACKED_NAMES):
                raise ValueError(
                    f"{self.folder} holds {name} as {place.dtype}, which is quantised: known are {', '.join(WHOLE)}. "
                    "Give the checkpoint it was quantised from."
                )


def places_in(header: bytes, where: str) -> tuple[TensorInfo, ...]:
    """The tensors that the head of a safetensors file tells of, in the order of the data."""
    fields = parse_json(header[8:].decode(), f"The header of {where}")
    fields.pop("__metadata__", None)
    tensors = [
        TensorInfo(name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        for name, entry in fields.items()
    ]
    return tuple(sorted(tensors, key=lambda place: (place.begin, place.end)))


def vocabulary_of(tokens: Mapping[str, int]) -> str:
    """A checksum of the tokens with their ids."""
    return hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()[:16]


def as_rows(tensor: Tensor) -> Float[Tensor, "rows width"]:
    """Every tensor as a matrix: the last axis is the width; a vector is a column."""
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(-1, 1)


def blocks(shape: Sequence[int], size: int = 1 << 17) -> list[slice]:
    """Slices of the rows of `as_rows`, of about `size` numbers each, in order."""
    width = shape[-1] if len(shape) > 1 else 1
    rows, step = prod(shape) // max(width, 1), max(1, size // max(width, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _folder(source: str | Path, revision: str | None, download: bool) -> Path:
    folder = Path(resolve(source))
    if folder.is_dir():
        return folder
    if Path(source).is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        raise FileNotFoundError(f"{source} is not a folder.")
    try:
        found = snapshot_download(
            str(source), revision=revision, allow_patterns=_HUB_FILES, local_files_only=not download
        )
    except LocalEntryNotFoundError as error:
        if download:
            raise
        raise FileNotFoundError(f"{source} is not on this machine: fetch it first, hf download {source}.") from error
    return Path(found)


def _config(path: Path) -> Mapping[str, Any]:
    config = read_json(path, "config of a model", finite=False)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no keys: it is no config of a model.")
    return config


def weight_map(index: Path) -> dict[str, str]:
    """In which file of its folder each tensor is. Raises ValueError where the index does not say so."""
    whole = read_json(inside(index.parent, index.name), "index of shards")
    if not isinstance(whole, dict) or "weight_map" not in whole:
        raise ValueError(f"{index} is not an index of shards: it holds no weight_map.")
    named = whole["weight_map"]
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise ValueError(f"{index} is not an index of shards: its weight_map names no files.")
    return named


def _check_index(index: Path, named: Mapping[str, str], shards: Sequence[Shard]) -> None:
    stored = {(place.name, shard.path.name) for shard in shards for place in shard.places}
    if odd := sorted(set(named.items()) ^ stored):
        name, file = odd[0]
        what = "names it, but the shard lacks it" if (name, file) not in stored else "does not name it there"
        raise ValueError(f"{index} and its shards disagree on {name} in {file}: the index {what} ({len(odd)} in all).")
