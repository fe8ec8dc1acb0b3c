"""Read a GGUF file as a Hugging Face checkpoint: converted once, then kept in a cache."""

import hashlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from probes.files import check_regular, reading, staged_folder

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
_TEXT, _ARRAY, _DIMENSIONS, _NESTED = 8, 9, 4, 4


def converted(file: Path) -> Path:
    """The folder of the checkpoint that `file` holds, dequantised to float32.

    Converted on first use (half a minute for 135 M parameters) and kept under `~/.cache/thinksteer`, or
    `$XDG_CACHE_HOME/thinksteer`, by the file's checksum.
    """
    with reading(file, "GGUF file"), file.open("rb") as handle:
        check_gguf(file)
        checksum = hashlib.file_digest(handle, "sha256").hexdigest()[:16]

    def convert(folder: Path) -> None:
        with reading(file, "model in a GGUF file"):
            _convert(file, folder)

    return made_once(f"{file.stem}-{checksum}", convert)


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache, made at the first call: a second first call waits for the first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "thinksteer"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / name
    with FileLock(cache / f".{name}.lock"):
        if not folder.exists():
            make(folder)
    return folder


def check_gguf(path: Path, most: int = 1 << 23) -> None:
    """Walk over the head of a GGUF file. Raises ValueError for counts, lengths and sizes that its bytes do not hold.

    Its reader believes them: an array of 2^60 numbers would be counted through. `most` bounds the values of arrays.
    """
    with reading(path, "GGUF file"), _opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if file.read(4) != b"GGUF" or _number(file, 4) not in (2, 3):
            raise ValueError("it does not begin as one of version 2 or 3")
        tensors, pairs = _number(file, 8), _number(file, 8)
        seen: set[bytes] = set()
        for _ in range(pairs):
            if (key := _text(file, size)) in seen:
                raise ValueError(f"it has the key {key.decode(errors='replace')!r} twice")
            seen.add(key)
            most = _skip_value(file, size, _number(file, 4), most)
        for _ in range(tensors):
            name = _text(file, size)
            if (dimensions := _number(file, 4)) > _DIMENSIONS:
                raise ValueError(f"the tensor {name.decode(errors='replace')!r} has {dimensions} dimensions")
            shape = [_number(file, 8) for _ in range(dimensions)]
            _number(file, 4), _number(file, 8)
            if prod(shape) > 8 * size or min(shape, default=1) < 1:  # a number takes more than a bit
                raise ValueError(f"the tensor {name.decode(errors='replace')!r} has the shape {shape}")


def _skip_value(file: BinaryIO, size: int, kind: int, most: int, depth: int = 0) -> int:
    """Pass over a value; gives how many values of arrays may still come."""
    if kind in _SIZES:
        _take(file, _SIZES[kind])
    elif kind == _TEXT:
        _text(file, size)
    elif kind == _ARRAY and depth < _NESTED:
        inner, count = _number(file, 4), _number(file, 8)
        if count > most or count * _SIZES.get(inner, 8) > size:
            raise ValueError(f"an array in it has {count:,} values")
        most -= count
        if inner in _SIZES:
            _take(file, count * _SIZES[inner])
        else:
            for _ in range(count):
                most = _skip_value(file, size, inner, most, depth + 1)
    else:
        raise ValueError(f"a value in it is of type {kind}")
    return most


def _text(file: BinaryIO, size: int) -> bytes:
    length = _number(file, 8)
    if length > size:
        raise ValueError(f"a text in it has {length:,} bytes")
    return _take(file, length)


def _opened(path: Path) -> BinaryIO:
    check_regular(path)  # before it is opened: a pipe waits for whoever writes
    return Path(path).open("rb")


def _number(file: BinaryIO, size: int) -> int:
    return int.from_bytes(_take(file, size), "little")


def _take(file: BinaryIO, size: int) -> bytes:
    taken = file.read(size)
    if len(taken) < size:
        raise ValueError("it ends early")
    return taken


def _convert(file: Path, folder: Path) -> None:
    if find_spec("gguf") is None:
        raise ImportError("A GGUF file is read by the package gguf: pip install 'thinksteer[smollm]'.")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    plain = GgufConfig(dequantize=True)  # else the model cannot be saved
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=plain, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    with staged_folder(folder) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
