"""Steering vectors of vllm-lens as JSON, as a server takes them."""

import base64
import binascii
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.directions.vector import number_in
from probes.files import check_keys, staged_file
from probes.model.sites import Site
from probes.texts import read_json
from steer.interop.contents import OURS, added, check_mapping, check_steps, notes, recipe_of
from steer.interventions.activation import Add
from steer.recipes.recipe import Recipe, Step

NAME = "vllm-lens"
_KEYS = ("activations", "layer_indices", "scale", "norm_match", "position_indices")
_BYTES = 1 << 28  # of the vectors of one file, unpacked: 60 layers of width 8,192 have 2 MB
_DEFAULTS: dict[str, Any] = {"scale": 1.0, "norm_match": False, "position_indices": None}
_TENSOR = ("data", "dtype", "original_dtype", "shape", "compression")
# what bytes are stored as, and what they are: float16 and float32 as themselves, bfloat16 in two bytes
_DTYPES = {
    ("float32", "torch.float32"): torch.float32,
    ("float16", "torch.float16"): torch.float16,
    ("int16", "torch.bfloat16"): torch.bfloat16,
}


def write(recipe: Recipe, path: Path) -> None:
    """One steering vector: a row for each block whose output is steered, strength times vector, at scale 1.

    Adds at one site are summed. Our notes ride on a key that its reader skips. Raises ValueError for all that the
    format cannot hold.
    """
    check_steps(recipe, NAME)
    directions = dict(sorted(added(recipe.steps).items()))
    if len({len(vector) for vector in directions.values()}) > 1:
        raise ValueError("The vectors of the recipe differ in width, so they do not fit one model.")
    rows = torch.stack(list(directions.values())).contiguous()
    data = _zstd().ZstdCompressor().compress(rows.numpy().astype("<f4").tobytes())
    fields = {
        "activations": {
            "data": base64.b64encode(data).decode(),
            "dtype": "float32",
            "original_dtype": "torch.float32",
            "shape": list(rows.shape),
            "compression": "zstd",
        },
        "layer_indices": [site.layer for site in directions],
        **_DEFAULTS,
        OURS: notes(recipe),
    }
    with staged_file(path) as stage:
        stage.write_text(json.dumps(fields), encoding="utf-8")


def read(path: Path, model: PreTrainedModel) -> Recipe:
    """An Add for each row. The file holds one steering vector or a list of them.

    Raises ValueError for what an Add is not: `norm_match`, positions; and for a tensor that is damaged or does not fit.
    """
    whole = read_json(path)
    vectors = whole if isinstance(whole, list) else [whole]
    steps: list[Step] = []
    noted = None
    for number, fields in enumerate(vectors):
        where = f"Vector {number} in {path}"
        check_mapping(fields, where)
        noted = fields.get(OURS, noted)
        fields = {**_DEFAULTS, **{key: value for key, value in fields.items() if key != OURS}}
        check_keys(fields, _KEYS, where)
        steps += _steps(fields, where)
    if not steps:
        raise ValueError(f"{path} holds no steering vectors.")
    return recipe_of(model, steps, path, None if noted is None else str(noted), "a steering vector of vllm-lens")


def _steps(fields: dict[str, Any], where: str) -> list[Step]:
    for key in ("norm_match", "position_indices"):
        if fields[key]:
            raise ValueError(f"{where} has {key} {fields[key]!r}, and an Add adds one vector at every position.")
    rows, layers = _tensor(fields["activations"], f"activations in {where}"), fields["layer_indices"]
    if rows.ndim != 2:
        raise ValueError(f"{where} has activations of shape {tuple(rows.shape)}, and an Add has no positions.")
    if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise ValueError(f"{where} has layer_indices {layers!r}, which are no layers.")
    if len(layers) != len(rows) or len(set(layers)) < len(layers):
        raise ValueError(f"{where} has {len(rows)} rows for the layers {layers}: each needs its own.")
    scale = number_in(fields, "scale", where)
    return [Step(Add(Site(layer, "resid_post"), row, scale)) for layer, row in zip(layers, rows, strict=True)]


def _tensor(fields: Any, where: str) -> Float[Tensor, "..."]:
    """No more is unpacked than the shape tells. Raises ValueError where the bytes are not those."""
    check_mapping(fields, where)
    check_keys(fields, _TENSOR, where)
    kind, shape = (fields["dtype"], fields["original_dtype"]), fields["shape"]
    if kind not in list(_DTYPES) or fields["compression"] != "zstd":
        known = "; ".join(f"{a} as {b}" for a, b in _DTYPES)
        raise ValueError(f"{where} is {kind[0]} as {kind[1]}, packed by {fields['compression']}. Known: {known}; zstd.")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{where} has shape {shape!r}, which is none.")
    dtype, zstd = _DTYPES[kind], _zstd()
    if (size := math.prod(shape) * dtype.itemsize) > _BYTES:
        raise ValueError(f"{where} has the shape {shape}, which is more than {_BYTES:,} bytes of steering vectors.")
    try:
        packed = base64.b64decode(fields["data"], validate=True)
        if (length := zstd.frame_content_size(packed)) != size:
            raise ValueError(f"it holds {length} bytes")
        data = zstd.ZstdDecompressor().decompress(packed)
    except (binascii.Error, TypeError, ValueError, MemoryError, zstd.ZstdError) as error:
        raise ValueError(f"{where} is no {kind[1]} of shape {shape}: {error}. Make it again.") from error
    array = np.frombuffer(data, np.dtype(kind[0]).newbyteorder("<")).astype(kind[0])
    return torch.from_numpy(array).view(dtype).reshape(shape)


def _zstd() -> Any:
    if find_spec("zstandard") is None:
        raise ImportError("vllm-lens packs its vectors with zstandard: pip install 'thinksteer[neighbours]'.")
    import zstandard

    return zstandard
