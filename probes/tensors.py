"""Tensors in safetensors files, with words in their header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from probes.files import check_regular, reading, staged_file
from probes.texts import parse_json

TENSOR_BYTES = 4 << 30  # that are read of a direction or a recipe, which hold vectors


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
    """The tensors of a safetensors file, and its words.

    Raises ValueError where it is no whole file, or of more than `TENSOR_BYTES`.
    """
    with reading(path, "safetensors file"):
        check_regular(path)
        if (size := Path(path).stat().st_size) > TENSOR_BYTES:
            raise ValueError(f"{path} has {size:,} bytes, and one of ours at most {TENSOR_BYTES:,}. Name another.")
        with safe_open(path, framework="pt") as file:
            words = parse_json((file.metadata() or {}).get("thinksteer", "{}"), f"The header of {path}")
            if not isinstance(words, dict):
                raise ValueError(f"The header of {path} holds no keys: it is no file of ours.")
            return {name: file.get_tensor(name) for name in file.keys()}, words  # noqa: SIM118
