"""Tensors in safetensors files, with words in their header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from probes.files import staged_file


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
