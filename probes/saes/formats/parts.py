"""What the readers share: the site out of a label, a tensor out of a file, a key out of a config."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from probes.files import check_regular, reading
from probes.model.sites import Site, SiteName

Side = Literal["input", "output"]
LARGEST = 64 << 30  # bytes that are read of a file
_MODULE = re.compile(r"(?:[\w.]*\.)?(?:layers|h|blocks|block)\.(?P<layer>\d+)(?:\.(?P<part>[\w.]+))?")
_PARTS: Mapping[str | None, SiteName] = {
    None: "resid_post",
    "mlp": "mlp_out",
    "block_sparse_moe": "mlp_out",
    "self_attn": "attn_out",
    "attn": "attn_out",
    "attention": "attn_out",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "mlp_in",
    "ln2.hook_normalized": "mlp_in",
    "mlp.hook_in": "mlp_in",
    "hook_mlp_in": "mlp_in",
}
_INPUTS: Mapping[SiteName, SiteName] = {"mlp_out": "mlp_in", "resid_post": "resid_pre", "attn_out": "attn_in"}


def site_of(label: str, where: str, *, side: Side = "output") -> Site:
    """The site that a label names: ours, a hook of TransformerLens, or a module path, of which the output is meant.

    Of a transcoder's MLP the `side` is `input`. Raises ValueError, naming `where`, for another.
    """
    try:
        return Site.parse(label)
    except ValueError:
        found = _MODULE.fullmatch(label)
    part = found and found["part"]
    if found is None or part not in _PARTS:
        raise ValueError(
            f"{where} says that it was trained at {label!r}, which is no site that is known. Say which it is: site=..."
        )
    name = _PARTS[part]
    return Site(int(found["layer"]), _INPUTS.get(name, name) if side == "input" else name)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors or npz file. Raises ValueError, naming it, where it is none, or too large."""
    with reading(path, "file of an autoencoder"):
        _check_size(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: torch.from_numpy(archive[name]) for name in archive.files}
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def pickled(path: Path, consent: bool) -> dict[str, Tensor]:
    """The tensors of a `.pt` file, read by torch's reader of weights alone.

    Raises PermissionError without consent: that reader has had faults, and the file is a stranger's. Raises ValueError
    where it holds anything else than named tensors.
    """
    if not consent:
        raise PermissionError(
            f"{path} is a pickle of torch, which can hold more than numbers. Its weights alone are read where you say "
            "that you trust its source: load_sae(..., pickle=True)."
        )
    with reading(path, "file of an autoencoder"):
        _check_size(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held):
        raise ValueError(f"{path} holds a {type(held).__name__}, not the tensors of an autoencoder by name.")
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


class Tensors:
    """The tensors of a file, taken one by one under any of the names that they go by, so that none is overlooked."""

    def __init__(self, named: Mapping[str, Tensor], where: str, dtype: torch.dtype) -> None:
        self.left, self.where, self.dtype = dict(named), where, dtype

    def take(self, *names: str) -> Tensor:
        """Raises ValueError, naming the file, where it is under none of the names."""
        found = self.maybe(*names)
        if found is None:
            raise ValueError(
                f"{self.where} lacks {' or '.join(names)}: it holds {', '.join(sorted(self.left)) or 'none'}."
            )
        return found

    def maybe(self, *names: str) -> Tensor | None:
        for name in names:
            if name in self.left:
                held = self.left.pop(name)
                return held.to(self.dtype) if held.is_floating_point() else held
        return None

    def done(self, *ignored: str) -> None:
        """Raise ValueError where something is left that would change what the autoencoder does."""
        if left := sorted(set(self.left) - set(ignored)):
            raise ValueError(f"{self.where} holds {', '.join(left)}, of which it is not known what it does.")


def known(fields: Mapping[str, Any], key: str, values: Mapping[Any, Any], where: str, default: Any = None) -> Any:
    """What the value under a key means. Raises ValueError, naming file and known values, for another."""
    given = fields.get(key, default)
    if isinstance(given, list | dict) or given not in values:
        raise ValueError(f"{where} has {key} {given!r}. Known: {', '.join(map(str, values))}.")
    return values[given]


def _check_size(path: Path) -> None:
    check_regular(path)
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path} has {size:,} bytes, and an autoencoder at most {LARGEST:,}.")
