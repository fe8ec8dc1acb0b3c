"""What was written, read back from disk and compared bit for bit with what was meant, a tensor at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from steer.checkpoints.checkpoint import COUNTS, WHOLE, Checkpoint, Shard

_PIECE = 1 << 24
WORDS = {dtype: word for word, dtype in {**WHOLE, **COUNTS}.items()}

Kind = tuple[str, list[int]]  # dtype, in the words of safetensors, and shape


@dataclass(frozen=True, eq=False)
class Meant:
    """A tensor as it is to stand on disk, its dtype in the words of safetensors; `digest` is its bytes' checksum."""

    dtype: str
    shape: tuple[int, ...]
    digest: Callable[[], str]

    @classmethod
    def of(cls, tensor: Tensor) -> "Meant":
        return cls(WORDS[tensor.dtype], tuple(tensor.shape), lambda: digest_of(pieces(tensor)))


def prove_written(folder: Path, meant: Mapping[str, Meant], *, stem: str = "model") -> None:
    """Raise ValueError, naming the tensor, where the folder's safetensors are not what was meant.

    The same names, and of each tensor the same shape, dtype and bits.
    """
    _prove(folder, Checkpoint.open(folder, stem=stem).shards, meant)


def prove_file(path: Path, meant: Mapping[str, Meant]) -> None:
    """As `prove_written`, of one file."""
    _prove(path, [Shard.open(path)], meant)


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor as they are, in order."""
    yield from tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(_PIECE)


def digest_of(chunks: Iterable[Tensor]) -> str:
    """A checksum of the bytes of these chunks together, and how many they are: it tells a fault, not a forger, and
    takes half the time of a cryptographic one."""
    digest = length = 0
    for chunk in chunks:
        digest, length = crc32(chunk.cpu().numpy().data, digest), length + len(chunk)
    return f"{digest:08x}.{length}"


def prove_tensors(folder: Path, meant: Mapping[str, Meant]) -> None:
    """As `prove_written`, of some tensors of a folder that holds others, too."""
    _prove(folder, Checkpoint.open(folder).shards, meant, some=True)


def _prove(where: Path, shards: Iterable[Shard], meant: Mapping[str, Meant], *, some: bool = False) -> None:
    places = {place.name: (shard, place) for shard in shards for place in shard.places}
    check_names(where, meant.keys() - places.keys(), () if some else places.keys() - meant.keys())
    for name, wanted in meant.items():
        shard, place = places[name]
        check_kind(where, name, (place.dtype, list(place.shape)), (wanted.dtype, list(wanted.shape)))
        if digest_of(pieces(shard.file.get_tensor(name))) != wanted.digest():
            raise odd(where, name, "its numbers are others")


def check_names(folder: Path, missing: Iterable[str], extra: Iterable[str]) -> None:
    refuse(folder, missing, "it is not there")
    refuse(folder, extra, "nothing was meant to be there")


def refuse(folder: Path, names: Iterable[str], fault: str) -> None:
    if names := sorted(names):
        raise odd(folder, names[0], fault + (f", as with {len(names) - 1} others" if names[1:] else ""))


def check_kind(folder: Path, name: str, stored: Kind, meant: Kind) -> None:
    for told, wanted in zip(map(str, stored), map(str, meant), strict=True):
        if told != wanted:
            raise odd(folder, name, f"it is {told}, and was meant to be {wanted}")


def odd(folder: Path, name: str, fault: str) -> ValueError:
    return ValueError(
        f"{name} was not written as it was computed: read back from {folder}, {fault}. Nothing is kept under its "
        "name. Look at the disk and the version of safetensors, then write it again."
    )
