"""Outputs that appear under their name whole or not at all, and readers that trust no file."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A hidden folder beside `final`, renamed to it when the block ends well, else removed.

    Raises FileExistsError if `final` exists: nothing is overwritten.
    """
    final = Path(final)
    if final.exists():
        raise FileExistsError(f"{final} exists. Name another output folder, or remove it first.")
    final.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    try:
        yield stage
        stage.chmod(0o755)
        stage.rename(final)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """A hidden file beside `final`, moved over it when the block ends well, else removed."""
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent)
    os.close(handle)
    stage = Path(name)
    try:
        yield stage
        stage.chmod(0o644)
        stage.replace(final)
    finally:
        stage.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], words: Mapping[str, Any] | None = None) -> None:
    """A safetensors file; `words` travel in its header as JSON under the key `thinksteer`."""
    metadata = None if words is None else {"thinksteer": json.dumps(words)}
    with staged_file(path) as stage:
        save_file(
            {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
            stage,
            metadata,
        )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, and its words. Raises ValueError where it is no whole file."""
    try:
        with safe_open(path, framework="pt") as file:
            words = json.loads((file.metadata() or {}).get("thinksteer", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, words  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). It may be truncated: make it again."
        ) from error


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        words = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(words, dict):
        raise ValueError(f"{path} holds no keys: it is not a file of ours.")
    return words


def check_keys(words: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse keys that are unknown and keys that are missing, by name."""
    known = list(known)
    if unknown := sorted(set(words) - set(known)):
        raise ValueError(f"{where} has unknown keys: {', '.join(unknown)}. Known: {', '.join(known)}.")
    if missing := [key for key in known if key not in words]:
        raise ValueError(f"{where} lacks keys: {', '.join(missing)}.")
