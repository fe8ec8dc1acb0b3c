"""What was written, read back from disk and compared bit for bit with what was meant, a tensor at a time."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steer.checkpoints.checkpoint import COUNTS, WHOLE, Checkpoint, Shard
from steer.checkpoints.conversions import Loading, unmade

_PIECE = 1 << 24
_WORDS = {dtype: word for word, dtype in {**WHOLE, **COUNTS}.items()}

Kind = tuple[str, list[int]]  # dtype, in the words of safetensors, and shape


@dataclass(frozen=True, eq=False)
class Meant:
    """A tensor as it is to stand on disk, its dtype in the words of safetensors; `digest` is its bytes' checksum."""

    dtype: str
    shape: tuple[int, ...]
    digest: Callable[[], str]

    @classmethod
    def of(cls, tensor: Tensor) -> "Meant":
        return cls(_WORDS[tensor.dtype], tuple(tensor.shape), lambda: digest_of(pieces(tensor)))


def prove_written(folder: Path, meant: Mapping[str, Meant], *, stem: str = "model") -> None:
    """Raise ValueError, naming the tensor, where the folder's safetensors are not what was meant.

    The same names, and of each tensor the same shape, dtype and bits.
    """
    _prove(folder, Checkpoint.open(folder, stem=stem).shards, meant)


def prove_file(path: Path, meant: Mapping[str, Meant]) -> None:
    """As `prove_written`, of one file."""
    _prove(path, [Shard.open(path)], meant)


@torch.no_grad()
def prove_model(folder: Path, model: PreTrainedModel, *, beside: Collection[str] = ()) -> None:
    """Raise ValueError, naming the tensor, where transformers would not load this very model from the folder.

    The config that was written makes a model without numbers; what the files hold is put together as it is when that
    model is loaded, and compared with the model's own tensors, shape, dtype and bits. A tied tensor is the one that it
    is tied to. `beside` names tensors that are there for others to read. Memory is one parameter's.
    """
    checkpoint = Checkpoint.open(folder)
    loading, ours = Loading.of(unmade(model, type(model.config).from_pretrained(folder))), model.state_dict()
    _check_config(folder, loading.state, ours)
    groups = loading.groups(name for name in checkpoint.places if name not in beside)
    extra = [name for key, members in groups.items() if key not in ours for name in members]
    _check_names(folder, set(beside) - checkpoint.places.keys(), extra)
    found = set[str]()
    for key, members in groups.items():
        for name, stored in loading.made(key, members, {name: checkpoint.read(name) for name in members}).items():
            if name not in ours:
                raise _odd(folder, name, "nothing was meant to be there")
            _compare(folder, name, stored, ours[name])
            found.add(name)
    for name in ours.keys() - found:
        _check_tied(folder, name, found, model, loading)


def _check_config(folder: Path, promised: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    _refuse(folder, ours.keys() - promised.keys(), "its config makes no such tensor")
    _refuse(folder, promised.keys() - ours.keys(), "its config makes such a tensor, and the model has none")
    for name, tensor in promised.items():
        if tensor.shape != ours[name].shape:
            raise _odd(folder, name, f"its config makes it {list(tensor.shape)}, and it is {list(ours[name].shape)}")


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor as they are, in order."""
    yield from tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(_PIECE)


def digest_of(chunks: Iterable[Tensor]) -> str:
    """A checksum of the bytes of these chunks together."""
    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        digest.update(chunk.cpu().numpy().data)
    return digest.hexdigest()


def prove_tensors(folder: Path, meant: Mapping[str, Meant]) -> None:
    """As `prove_written`, of some tensors of a folder that holds others, too."""
    _prove(folder, Checkpoint.open(folder).shards, meant, some=True)


def _prove(where: Path, shards: Iterable[Shard], meant: Mapping[str, Meant], *, some: bool = False) -> None:
    places = {place.name: (shard, place) for shard in shards for place in shard.places}
    _check_names(where, meant.keys() - places.keys(), () if some else places.keys() - meant.keys())
    for name, wanted in meant.items():
        shard, place = places[name]
        _check_kind(where, name, (place.dtype, list(place.shape)), (wanted.dtype, list(wanted.shape)))
        if digest_of(pieces(shard.file.get_tensor(name))) != wanted.digest():
            raise _odd(where, name, "its numbers are others")


def _check_names(folder: Path, missing: Iterable[str], extra: Iterable[str]) -> None:
    _refuse(folder, missing, "it is not there")
    _refuse(folder, extra, "nothing was meant to be there")


def _refuse(folder: Path, names: Iterable[str], fault: str) -> None:
    if odd := sorted(names):
        raise _odd(folder, odd[0], fault + (f", as with {len(odd) - 1} others" if odd[1:] else ""))


def _check_kind(folder: Path, name: str, stored: Kind, meant: Kind) -> None:
    for told, wanted in zip(map(str, stored), map(str, meant), strict=True):
        if told != wanted:
            raise _odd(folder, name, f"it is {told}, and was meant to be {wanted}")


def _kind(tensor: Tensor) -> Kind:
    return _WORDS.get(tensor.dtype, str(tensor.dtype)[6:]), list(tensor.shape)


def _compare(folder: Path, name: str, stored: Tensor, meant: Tensor) -> None:
    if meant.is_meta:
        raise ValueError(
            f"{name} is not in memory, so it cannot be compared: load the model whole, without offloading."
        )
    _check_kind(folder, name, _kind(stored), _kind(meant))
    for a, b in zip(pieces(stored), pieces(meant), strict=True):
        if not torch.equal(a, b.cpu()):
            raise _odd(folder, name, "its numbers are others")


def _check_tied(folder: Path, name: str, found: Collection[str], model: PreTrainedModel, loading: Loading) -> None:
    """A tensor that no file holds is one that the config ties to another, of the same numbers."""
    if name in (model._keys_to_ignore_on_save or ()):
        return
    tied = [other for other in found if loading.state[other] is loading.state[name]]
    if not tied:
        raise _odd(folder, name, "it is not there")
    ours = model.state_dict()
    _compare(folder, name, ours[tied[0]], ours[name])


def _odd(folder: Path, name: str, fault: str) -> ValueError:
    return ValueError(
        f"{name} was not written as it was computed: read back from {folder}, {fault}. Nothing is kept under its "
        "name. Look at the disk and the version of safetensors, then write it again."
    )
