"""A PEFT LoRA adapter as a weight delta: (lora_alpha / r) B A for each module *(Hu et al. 2022)*."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from probes.fields import keys_of
from probes.files import inside, reading
from probes.tables import Brief
from probes.texts import read_json
from steer.checkpoints.checkpoint import Checkpoint, as_rows

# A regular expression of a file is run only where it cannot run long: names, dots, and "or".
_NAMES = re.compile(r"\^?(?:\w|\.|\\\.|-|\|){1,500}\$?")
_PREFIX = "base_model.model."
_HOME = Path(__file__).parent / "shipped"
SHIPPED = {f"organism-{kind}": _HOME / kind for kind in ("rl", "sft", "target")} | {
    "reasoner-rl": _HOME / "reasoner-rl"
}
_COPY = ".base_layer.weight"  # peft saves an embedding that it adapts as well
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:(?P<embedding>embedding_)?(?P<side>[AB]))(?:\.(?P<kind>weight|bias))?")
# Keys of an adapter_config.json with which it adds something else.
_REFUSED = (
    "use_dora", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
    "target_parameters", "layer_replication", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base model as well


def place_of(folder: Path) -> str:
    """Where a delta is, in words that hold on another machine for those that are shipped."""
    return next((name for name, shipped in SHIPPED.items() if shipped == folder), str(folder))


@dataclass(frozen=True, eq=False, repr=False)
class Factors(Brief):
    """A matrix as up @ down, `up` [rows, rank] and `down` [rank, width]."""

    up: Float[Tensor, "rows rank"]
    down: Float[Tensor, "rank width"]

    def block(self, rows: slice) -> Float[Tensor, "rows width"]:
        return self.up[rows].double() @ self.down.double()


@dataclass(frozen=True, eq=False, repr=False)
class Adapter(Brief):
    """The tensors an adapter adds, by the name of the tensor they are added to. The scaling is in `up`, once.

    Of a tensor [rows, width], `up` is [rows, rank] and `down` [rank, width] *(LoRA, Hu et al. 2022)*.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Ablate, Recipe
    >>> from steer.deltas import Adapter
    >>> from steer.folding import export_adapter
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Ablate(Site(2, "result", 3), torch.ones(96))])
    >>> changes = export_adapter(model, recipe, "adapter")
    >>> adapter = Adapter.open("adapter")
    >>> list(adapter.names), adapter.factors["model.layers.2.self_attn.o_proj.weight"].up.shape
    (['model.layers.2.self_attn.o_proj.weight'], torch.Size([96, 1]))
    """

    folder: Path
    factors: Mapping[str, Factors]
    biases: Mapping[str, Tensor]
    checkpoint: Checkpoint

    @classmethod
    def open(cls, folder: str | Path) -> "Adapter":
        """LoRA and rsLoRA, of Linear, Conv1D and Embedding, with `lora_bias`, rank and alpha patterns.

        Raises ValueError, by name, for what adds something else than (lora_alpha / r) B A: DoRA depends on the base's
        weights, PiSSA and its like change them, and modules saved whole are no delta.
        """
        with reading(folder, "LoRA adapter"):
            return cls._read(Path(folder))

    @classmethod
    def _read(cls, folder: Path) -> "Adapter":
        config = read_json(inside(folder, "adapter_config.json"), "config of an adapter")
        _check(keys_of(config, f"{folder / 'adapter_config.json'}"), folder)
        checkpoint = Checkpoint.open(folder, stem="adapter_model")
        sides: dict[str, dict[str, Tensor]] = {}
        for key in checkpoint.places:
            if key.endswith(_COPY):
                continue
            match = _FACTOR.fullmatch(key.removeprefix(_PREFIX))
            if match is None or not key.startswith(_PREFIX):
                raise ValueError(f"{folder} holds {key}, which is no factor of LoRA: merge it with peft first.")
            part = (match["embedding"] or "") + match["side"] + ("_bias" if match["kind"] == "bias" else "")
            sides.setdefault(match["module"], {})[part] = checkpoint.read(key)
        if not sides:
            raise ValueError(f"{folder} is an adapter without tensors: it changes nothing.")
        factors, biases = {}, {}
        for module, parts in sides.items():
            factors[f"{module}.weight"] = _factors(module, parts, config, folder)
            if "B_bias" in parts:
                biases[f"{module}.bias"] = parts["B_bias"].double() * _scaling(module, parts, config)
        return cls(folder, factors, biases, checkpoint)

    @property
    def notes(self) -> tuple[str, ...]:
        copies = [key.removeprefix(_PREFIX) for key in self.checkpoint.places if key.endswith(_COPY)]
        return tuple(f"{self.folder} carries {key}, a copy of its base: the target's own stays." for key in copies)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.factors, *self.biases)

    @property
    def vocabulary(self) -> None:
        """An adapter's tokens are its base's."""

    @property
    def tied(self) -> None: ...

    @property
    def config(self) -> Mapping[str, Any]:
        return {}

    @property
    def words(self) -> dict[str, Any]:
        return {"adapter": place_of(self.folder), "fingerprint": self.checkpoint.fingerprint}

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.biases:
            return tuple(self.biases[name].shape)
        return len(self.factors[name].up), self.factors[name].down.shape[1]

    def block(self, name: str, rows: slice) -> Float[Tensor, "rows width"]:
        return as_rows(self.biases[name])[rows] if name in self.biases else self.factors[name].block(rows)


def _check(config: Mapping[str, Any], folder: Path) -> None:
    patterns = keys_of(config.get("alpha_pattern") or {}, f"alpha_pattern in {folder}")
    if odd_key := next((key for key in patterns if not _NAMES.fullmatch(key)), None):
        raise ValueError(
            f"{folder} has the alpha_pattern {odd_key[:80]!r}, and patterns of names alone are read, such as "
            "'self_attn.q_proj' or 'q_proj|k_proj': write its modules one by one."
        )
    for name, alpha in {"lora_alpha": config.get("lora_alpha"), **patterns}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or abs(alpha) > 1e9:
            raise ValueError(f"{folder} has {str(alpha)[:40]!r} as {name[:80]}, which is no size of an adapter.")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is an adapter of type {config.get('peft_type')}: only LORA is a difference.")
    start = config.get("init_lora_weights", True)
    odd = [key for key in _REFUSED if config.get(key)] + ([] if start in _PLAIN_STARTS else [f"init {start!r}"])
    if config.get("bias", "none") != "none":
        odd.append(f"bias {config['bias']!r}")
    if odd:
        raise ValueError(
            f"{folder} uses {', '.join(odd)}: what it adds is not (lora_alpha / r) B A alone. Merge it into its base "
            "with peft (merge_and_unload, save_pretrained), and take the difference of the two checkpoints."
        )


def _factors(module: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> Factors:
    kinds = {"A", "B"} if "A" in parts else {"embedding_A", "embedding_B"}
    if not kinds <= set(parts) or set(parts) - kinds - {"B_bias"}:
        raise ValueError(f"{folder} does not hold both factors of {module}, but {', '.join(sorted(parts))}.")
    down, up = (parts[kind] for kind in sorted(kinds))
    if down.dim() != 2 or up.dim() != 2 or len(down) != up.shape[1]:
        shapes = f"{list(up.shape)} and {list(down.shape)}"
        raise ValueError(f"The factors of {module} in {folder} are {shapes}: they make no matrix.")
    up = up.double() * _scaling(module, parts, config)
    if "embedding_A" in parts or config.get("fan_in_fan_out"):  # the stored matrix is the transpose
        return Factors(down.T, up.T)
    return Factors(up, down)


def _scaling(module: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> float:
    """lora_alpha / r, with rsLoRA lora_alpha / √r; the pattern that names the module has the word on lora_alpha."""
    rank = len(parts["A"] if "A" in parts else parts["embedding_A"])
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
    if not rank:
        raise ValueError(f"The factors of {module} have rank 0: they make no matrix.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
