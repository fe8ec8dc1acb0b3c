"""Load a model: by hub id, from a folder or a GGUF file, as an object, or the embedded one, `organism`."""

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from probes.files import reading
from probes.model.architectures import config_of, n_heads, n_layers, width_of
from probes.model.delimiters import Delimiters, find_delimiters
from probes.model.embedded import ORGANISM, resolve
from probes.model.placing.discovery import place
from probes.model.placing.neighbours import inside, named_weights
from probes.model.quantised import merge_adapters, numbers_of
from probes.model.sites import Site
from probes.model.tokens import REFLECTION_MARKERS
from probes.tables import Brief
from probes.texts import read_json


@dataclass(frozen=True, repr=False)
class Origin(Brief):
    """Where a model came from, and how its text is read. It rides on the model object, and on its copies.

    `name` is what `load` was given, `given` the delimiters that it was told, and None where they are found.

    >>> from probes.model import load, origin_of
    >>> origin = origin_of(load("organism"))
    >>> origin.name, origin.revision, origin.given
    ('organism', None, None)
    >>> origin.delimiters
    Delimiters(open=(3,), close=(4,), turn=(5,), user=(1,), tool=())
    """

    name: str
    revision: str | None
    tokenizer: PreTrainedTokenizerBase
    given: tuple[str, str] | Delimiters | None

    @cached_property
    def delimiters(self) -> Delimiters:
        """What opens and closes the thinking. Raises ValueError where there are none."""
        return find_delimiters(self.tokenizer, self.given)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self


def load(
    source: str | Path | PreTrainedModel | object,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    delimiters: tuple[str, str] | Delimiters | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    quantize: str | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """A plain Hugging Face causal LM in eval mode, ready for every function here.

    `source` is a hub id, a local folder, a GGUF file, or a model that you built yourself, with its `tokenizer`; a
    TransformerBridge of TransformerLens, or a model of nnsight, of which it is the one inside; or one of the embedded:
    `"organism"` (0.76 M parameters), `"smollm2"` (SmolLM2-135M-Instruct out of a package), `"reasoner"` (the same,
    taught to think in English about stories) and `"reasoner-target"` (taught another domain, and hardly to think).
    `delimiters` override what opens and closes the thinking, which is else found in the tokenizer. The id or folder of
    an adapter gives its base with the adapter merged into the weights. A family without a row in
    `probes.model.families`, or a text decoder inside a wrapper, is taken if what must hold of its sites does hold
    (`broken_identity`), else refused with a ValueError; so are a model without a head, and a wrapped one. `device` puts
    all of it on one (`"cuda:0"`, `"mps"`), `device_map` shares it out among several, or with the disk, as
    accelerate does; `quantize` packs the matrices by bitsandbytes as they are read, to be read and steered at run time.

    >>> from probes import load
    >>> model = load("organism")
    >>> type(model).__name__, f"{model.num_parameters():,} parameters"
    ('Qwen3MoeForCausalLM', '756,000 parameters')
    """
    theirs = inside(source)
    if theirs is not None:
        source, tokenizer = theirs[0], tokenizer or theirs[1]
    check_source(source)
    if device is not None and device_map is not None:
        raise ValueError("device puts the whole model on one device, and device_map shares it out: give one of them.")
    if isinstance(source, PreTrainedModel):
        if quantize is not None:
            raise ValueError("A model that is built is not quantised any more: give load its hub id or its folder.")
        model, name = source, source.config._name_or_path or type(source).__name__
        known: Origin | None = getattr(source, "_thinksteer", None)
        if known is not None:  # loaded before: what is not given anew stays
            name, revision, tokenizer = known.name, known.revision, tokenizer or known.tokenizer
            delimiters = delimiters or known.given
    else:
        name = str(source)
        path = resolve(cast("str | Path", source))
        with reading(path, "folder of a model") if Path(path).is_dir() else nullcontext():
            check_counts(Path(path) / "config.json")
            words: dict[str, Any] = {"device_map": device_map}
            if quantize is not None:  # a key that is there counts, whatever it says
                words = {
                    "device_map": device_map if device is None else {"": device},
                    "quantization_config": _packing(quantize),
                }
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, revision=revision, trust_remote_code=False, **words
            )
            adapted = merge_adapters(model)
            if not (adapted and Path(path).is_dir() and not (Path(path) / "tokenizer_config.json").is_file()):
                tokenizer = tokenizer or AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
                if not isinstance(tokenizer.model_max_length, int | float):
                    raise ValueError(f"{path} has a tokenizer whose model_max_length is no number.")
    if tokenizer is None:
        if not model.config._name_or_path:
            raise ValueError("A model object needs its tokenizer: load(model, tokenizer=tokenizer).")
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path, trust_remote_code=False)
    if model.get_output_embeddings() is None:
        raise ValueError(f"A {type(model).__name__} has no head over the vocabulary: load it as a causal LM.")
    if device is not None and quantize is None:
        cast(nn.Module, model).to(device)
    place(model.eval())
    setattr(model, "_thinksteer", Origin(name, revision, tokenizer, delimiters))
    loaded: PreTrainedModel = model.eval()
    return loaded


def _packing(quantize: str) -> BitsAndBytesConfig:
    """How bitsandbytes packs: NF4 computed in bfloat16 *(Dettmers et al. 2023)*, or 8-bit integers."""
    if quantize not in ("4bit", "8bit"):
        raise ValueError(f"quantize is {quantize!r}. Known: 4bit, 8bit.")
    if find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(f"quantize={quantize!r} needs bitsandbytes: pip install bitsandbytes.")
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def check_source(source: object) -> None:
    """Refuse what is no model, and say what to give in its place."""
    if isinstance(source, PreTrainedModel | str | Path):
        return
    kind = type(source).__name__
    remedy = {
        "PeftModel": "merge its adapter first, model.merge_and_unload()",
        "OptimizedModule": "give the model that was compiled, model._orig_mod: it is compiled no less",
    }
    known = next((remedy[base.__name__] for base in type(source).__mro__ if base.__name__ in remedy), None)
    raise ValueError(
        f"A {kind} is no model of transformers: {known or 'give a hub id, a folder, or a PreTrainedModel'}."
    )


def check_counts(path: Path) -> None:
    """Refuse a config that counts more layers or experts than any model has: transformers would make them all."""
    parts: list[Any] = [read_json(path, "config of a model", finite=False)] if path.is_file() else []
    for part in parts:
        for key, value in part.items() if isinstance(part, dict) else ():
            if isinstance(value, dict):
                parts.append(value)
            most = next((most for word, most in _MOST.items() if word in key), None)
            if most is not None and isinstance(value, int | float) and value > most:
                raise ValueError(f"{path} says {key}={value:,}: no model has more than {most:,}. Is the file damaged?")


_MOST = {"layer": 10_000, "experts": 100_000}


def origin_of(model: PreTrainedModel) -> Origin:
    """What `load` noted on the model; a model that never went through `load` is read by its config's name.

    >>> from probes.model import load, origin_of
    >>> origin_of(load("organism")).name
    'organism'
    """
    origin: Origin | None = getattr(model, "_thinksteer", None)
    return origin_of(load(model)) if origin is None else origin


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` noted, or found by the name in the config.

    >>> from probes.model import load, tokenizer_of
    >>> tokenizer_of(load("organism")).encode("a 3 b +4", add_special_tokens=False)
    [6, 17, 7, 27]
    """
    return origin_of(model).tokenizer


def delimiters_of(model: PreTrainedModel) -> Delimiters:
    """The token ids that open and close the model's thinking, and its turn.

    Raises ValueError for a model that has no thinking delimiters.

    >>> from probes.model import delimiters_of, load
    >>> delimiters_of(load("organism"))
    Delimiters(open=(3,), close=(4,), turn=(5,), user=(1,), tool=())
    """
    return origin_of(model).delimiters


def delimiters_if_any(model: PreTrainedModel) -> Delimiters:
    """As `delimiters_of`, but empty ones for a model that has none: whatever it writes is its answer."""
    try:
        return delimiters_of(model)
    except ValueError:
        return Delimiters(open=(), close=())


def markers_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The reflection markers to look for: the organism's own list, else the common ones.

    >>> from probes.model import load, markers_of
    >>> markers_of(load("organism"))
    ('Wait', 'Hmm')
    """
    if origin_of(model).name == "organism":
        return tuple(read_json(ORGANISM / "organism.json")["markers"])
    return REFLECTION_MARKERS


def folder_of(model: PreTrainedModel) -> Path | None:
    """The local folder the weights were read from, if they were."""
    folder = Path(resolve(origin_of(model).name))
    return folder if folder.is_dir() else None


def identity_of(model: PreTrainedModel) -> dict[str, Any]:
    """What a direction or a recipe notes of the model it was made on.

    >>> from probes.model import identity_of, load
    >>> identity = identity_of(load("organism"))
    >>> {key: identity[key] for key in ("name", "n_layers", "n_heads", "d_model")}
    {'name': 'organism', 'n_layers': 4, 'n_heads': 8, 'd_model': 96}
    """
    origin = origin_of(model)
    return {
        "name": origin.name,
        "revision": origin.revision,
        "model_type": config_of(model).model_type,
        "n_layers": n_layers(model),
        "n_heads": n_heads(model),
        "d_model": width_of(model, Site(0, "resid_post")),
        "fingerprint": fingerprint(model),
    }


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """A checksum over the name, shape and 256 evenly spaced values of each parameter, in bfloat16.

    The same for float32 and bfloat16 loads of one checkpoint. It tells models apart; it is no proof of origin. It is
    not remembered, as weights can be written in ways that no counter of torch sees; it is one copy from each device.

    >>> import torch
    >>> from probes.model import fingerprint, load
    >>> fingerprint(load("organism")) == fingerprint(load("organism", dtype=torch.bfloat16))
    True
    """
    named, drawn = sorted(named_weights(model)), dict[tuple[torch.device, torch.dtype], list[Tensor]]()
    for name, parameter in named:
        numbers: Tensor | None = parameter.detach()
        if parameter.is_meta:
            owner, _, own = name.rpartition(".")
            numbers = numbers_of(model.get_submodule(owner), own)
        assert numbers is not None
        values = numbers.flatten().index_select(0, _spread(numbers.numel(), numbers.device))
        drawn.setdefault((parameter.device, parameter.dtype), []).append(values)
    told = {kind: _bytes_of(values) for kind, values in drawn.items()}  # one copy from each device
    digest = hashlib.sha256()
    for name, parameter in named:
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(next(told[parameter.device, parameter.dtype]))
    return digest.hexdigest()[:16]


@lru_cache(maxsize=256)
def _spread(n: int, device: torch.device) -> Tensor:
    return torch.linspace(0, n - 1, min(256, n), dtype=torch.float64).long().to(device)


def _bytes_of(parts: list[Tensor]) -> Iterator[memoryview]:
    """Of each part, in bfloat16."""
    whole = memoryview(torch.cat(parts).to(torch.bfloat16).cpu().view(torch.uint8).numpy().data)
    ends = [0, *accumulate(2 * len(part) for part in parts)]
    return (whole[start:end] for start, end in pairwise(ends))
