"""Which tensors differ between two checkpoints, by how much, and in how many dimensions."""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from probes.files import inside, reading
from probes.model.embedded import resolve
from probes.tables import Shown, Table
from steer.checkpoints.checkpoint import weight_map


@dataclass(frozen=True)
class TensorDifference:
    """One tensor: ‖B - A‖/‖A‖ and the rank of B - A above rounding; for a tensor in one checkpoint only, which.

    >>> from steer.checkpoints import TensorDifference
    >>> TensorDifference("lm_head.weight", (69, 96), "changed", relative_norm=0.25, rank=1).status
    'changed'
    """

    name: str
    shape: tuple[int, ...]
    status: str
    relative_norm: float
    rank: int


@dataclass(frozen=True, repr=False)
class Difference(Shown):
    """All tensors that differ; those not named are equal, value for value. It shows itself as a table.

    >>> from steer.checkpoints import diff
    >>> difference = diff("organism", "organism")
    >>> difference.names, difference.table().title
    ([], '0 of 151 tensors differ')
    """

    tensors: tuple[TensorDifference, ...]
    compared: int

    @property
    def names(self) -> list[str]:
        """The names of the tensors that differ."""
        return [tensor.name for tensor in self.tensors]

    def table(self) -> Table:
        """A row for each tensor that differs."""
        rows = [(t.name, str(list(t.shape)), t.status, t.relative_norm, t.rank) for t in self.tensors]
        title = f"{len(self.tensors)} of {self.compared} tensors differ"
        return Table(("tensor", "shape", "status", "relative norm", "rank"), tuple(rows), title)


def diff(a: str | Path, b: str | Path) -> Difference:
    """Compare two checkpoints tensor by tensor, holding one pair at a time.

    Each is a folder, a hub id, or a name that `probes.load` knows. Raises ValueError where a file is not whole,
    FileNotFoundError where a folder is not there or holds no safetensors.

    >>> from probes import load
    >>> from steer.checkpoints import diff
    >>> model = load("organism")
    >>> model.lm_head.weight.data *= 2
    >>> model.save_pretrained("doubled")
    >>> [(t.name, t.relative_norm, t.rank) for t in diff("organism", "doubled").tensors]
    [('lm_head.weight', 1.0, 69)]
    """
    files_a, files_b = tensor_files(a), tensor_files(b)
    names = sorted(files_a.keys() | files_b.keys())
    differences = []
    for name in tqdm(names, desc="comparing", unit="tensor", delay=2, leave=False):
        x, y = (_read(files[name], name) if name in files else None for files in (files_a, files_b))
        difference = _compare(name, x, y)
        if difference is not None:
            differences.append(difference)
    return Difference(tuple(differences), len(names))


def tensor_files(source: str | Path) -> dict[str, Path]:
    """In which file of a checkpoint each tensor is. No file outside its folder is opened."""
    folder = _folder(source)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = weight_map(index)
        for file in set(places.values()):
            if Path(file).name != file:
                raise ValueError(f"{index} names {file!r}, which is not a file of its own folder.")
        return {name: inside(folder, file) for name, file in places.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(f"{folder} holds no model.safetensors: it is not a safetensors checkpoint.")
    with reading(single, "safetensors file"), safe_open(inside(folder, single.name), framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _folder(source: str | Path) -> Path:
    folder = Path(resolve(source))
    if folder.is_dir():
        return folder
    if Path(source).is_absolute() or str(source).startswith("."):
        raise FileNotFoundError(f"{source} is not a folder.")
    return Path(snapshot_download(str(source), allow_patterns=["*.safetensors", "*.json"]))


def _read(path: Path, name: str) -> Tensor:
    with reading(path, "safetensors file"), safe_open(path, framework="pt") as file:
        out: Tensor = file.get_tensor(name)
        return out


def _compare(name: str, x: Tensor | None, y: Tensor | None) -> TensorDifference | None:
    if x is None or y is None:
        there = x if x is not None else y
        assert there is not None
        status = "only in B" if x is None else "only in A"
        return TensorDifference(name, tuple(there.shape), status, float("nan"), 0)
    if x.shape != y.shape:
        return TensorDifference(name, tuple(x.shape), f"shape {list(y.shape)} in B", float("nan"), 0)
    wide_x, wide_y = x.double(), y.double()
    if x.dtype == y.dtype and torch.equal(wide_x.nan_to_num(), wide_y.nan_to_num()) and _same_odd(wide_x, wide_y):
        return None
    delta = wide_y - wide_x
    status = "changed" if x.dtype == y.dtype else f"{str(x.dtype)[6:]} to {str(y.dtype)[6:]}"
    size, change = float(wide_x.norm()), float(delta.norm())
    relative = change / size if size else (float("inf") if change else 0.0)
    return TensorDifference(name, tuple(x.shape), status, relative, _rank(delta, y))


def _same_odd(x: Tensor, y: Tensor) -> bool:
    """Not a number, and infinite, in the same places."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf())


def _rank(delta: Tensor, stored: Tensor) -> int:
    """Singular values above what rounding can make: its error is at most eps/2 of each entry."""
    if delta.dim() < 2 or not bool(delta.isfinite().all()):
        return int(delta.any())
    eps = torch.finfo(stored.dtype if stored.is_floating_point() else torch.float64).eps
    rounding = eps * float(stored.double().norm())
    return int((torch.linalg.svdvals(delta.flatten(0, -2)) > rounding).sum())
