"""What was written, put together as transformers does when it loads it, and compared bit for bit with the model."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steer.checkpoints.checkpoint import Checkpoint
from steer.checkpoints.conversions import Loading, unmade
from steer.checkpoints.proof import WORDS, Kind, check_kind, check_names, odd, pieces, refuse


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
    check_names(folder, set(beside) - checkpoint.places.keys(), extra)
    found = set[str]()
    for key, members in groups.items():
        for name, stored in loading.made(key, members, {name: checkpoint.read(name) for name in members}).items():
            if name not in ours:
                raise odd(folder, name, "nothing was meant to be there")
            _compare(folder, name, stored, ours[name])
            found.add(name)
    for name in ours.keys() - found:
        _check_tied(folder, name, found, model, loading)


def _check_config(folder: Path, promised: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    refuse(folder, ours.keys() - promised.keys(), "its config makes no such tensor")
    refuse(folder, promised.keys() - ours.keys(), "its config makes such a tensor, and the model has none")
    for name, tensor in promised.items():
        if tensor.shape != ours[name].shape:
            raise odd(folder, name, f"its config makes it {list(tensor.shape)}, and it is {list(ours[name].shape)}")


def _kind(tensor: Tensor) -> Kind:
    return WORDS.get(tensor.dtype, str(tensor.dtype)[6:]), list(tensor.shape)


def _compare(folder: Path, name: str, stored: Tensor, meant: Tensor) -> None:
    if meant.is_meta:
        raise ValueError(
            f"{name} is not in memory, so it cannot be compared: load the model whole, without offloading."
        )
    check_kind(folder, name, _kind(stored), _kind(meant))
    for a, b in zip(pieces(stored), pieces(meant), strict=True):
        if not torch.equal(a, b.cpu()):
            raise odd(folder, name, "its numbers are others")


def _check_tied(folder: Path, name: str, found: Collection[str], model: PreTrainedModel, loading: Loading) -> None:
    """A tensor that no file holds is one that the config ties to another, of the same numbers."""
    if name in (model._keys_to_ignore_on_save or ()):
        return
    tied = [other for other in found if loading.state[other] is loading.state[name]]
    if not tied:
        raise odd(folder, name, "it is not there")
    ours = model.state_dict()
    _compare(folder, name, ours[tied[0]], ours[name])
