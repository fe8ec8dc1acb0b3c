"""The recipe files of ThinkSteer, read without it: what this plugin can do of them, and by name what it cannot."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from safetensors.torch import load_file
from torch import Tensor

from thinksteer_vllm.refusal import Refused

FORMATS = ("thinksteer recipe 2", "thinksteer recipe 1")
KINDS: Mapping[str, tuple[str, ...]] = {  # with their numbers beside the strength
    "add": (), "ablate": ("target",), "scale": (), "clamp": ("low", "high"), "rotate": (),
}  # fmt: skip
SITES = ("resid_pre", "z", "result", "attn_out", "resid_mid", "mlp_out", "resid_post")  # as a block computes them
PHASES = ("prompt", "thinking", "answer", "all")
_SITE = re.compile(r"L(\d+)(?:H(\d+))?(?:E(\d+))?\.(\w+)")
T = TypeVar("T")


@dataclass(frozen=True)
class Schedule:
    """The strength's multiple at thinking position t, with u = min(t / over, 1)."""

    shape: str
    start: float
    end: float
    over: float


@dataclass(frozen=True)
class Controller:
    """The strength's multiple after t thinking tokens: clamp(gain (1 - t / set_point), -1, 1)."""

    set_point: float
    gain: float = 4.0


@dataclass(frozen=True)
class Scope:
    """The tokens of a phase that meet every condition given."""

    phase: str = "all"
    tokens: tuple[int, ...] = ()
    after: int = 0
    markers: tuple[tuple[int, ...], ...] = ()
    window: tuple[int, int | None] = (0, None)
    schedule: Schedule | None = None
    controller: Controller | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """One intervention and its scope. `head` is None for a whole site."""

    kind: str
    layer: int
    site: str
    head: int | None
    strength: float
    numbers: Mapping[str, float]
    vector: Tensor | None
    scope: Scope

    @property
    def place(self) -> tuple[int, str, int]:
        return self.layer, self.site, -1 if self.head is None else self.head

    def __str__(self) -> str:
        head = "" if self.head is None else f"H{self.head}"
        return f"{self.kind} at L{self.layer}{head}.{self.site}"


@dataclass(frozen=True, eq=False)
class Recipe:
    """Steps in order, and what is known of the model that they were made on."""

    name: str
    steps: tuple[Step, ...]
    model: Mapping[str, Any]
    fingerprint: str

    @property
    def by_phase(self) -> bool:
        """Does it matter where the last header of the prompt is?"""
        return any(step.scope.phase != "all" for step in self.steps)

    def check(self, facts: Mapping[str, Any], n_heads: int, d_head: int) -> None:
        """Refuse a recipe of another model (`facts`: model_type, n_layers, d_model), or a vector of another width."""
        different = [key for key, value in facts.items() if self.model.get(key) != value]
        if different:
            words = ", ".join(f"{key} {self.model.get(key)} there, {facts[key]} here" for key in different)
            raise Refused(
                f"The recipe {self.name!r} was made for the model {self.model.get('name')!r}, not for this one: "
                f"{words}. Derive it again on this model, or leave it out."
            )
        for number, step in enumerate(self.steps):
            where = f"Step {number} of the recipe {self.name!r}, {step},"
            if not 0 <= step.layer < facts["n_layers"]:
                raise Refused(f"{where} names a layer that is not there: the model has 0 to {facts['n_layers'] - 1}.")
            if step.head is not None and not step.head < n_heads:
                raise Refused(f"{where} names a head that is not there: the model has 0 to {n_heads - 1}.")
            width = facts["d_model"] if step.site != "z" else d_head * (n_heads if step.head is None else 1)
            if step.vector is not None and tuple(step.vector.shape) != (width,):
                shape = "x".join(map(str, step.vector.shape))
                raise Refused(f"{where} has a vector of {shape} entries, but the activation there has {width}.")
            if step.kind in ("ablate", "clamp", "rotate") and not step.vector.any():
                raise Refused(f"{where} has a vector of zeros, so there is no direction to project on.")


def read_recipe(name: str, folder: Path, fingerprint: str) -> Recipe:
    """The recipe in a folder that `steer.Recipe.save` wrote. Refused, by name, is what this plugin cannot do."""
    path = folder / "recipe.yaml"
    words = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(words, dict) or words.get("format") not in FORMATS:
        given = words.get("format") if isinstance(words, dict) else words
        raise Refused(f"{path} has format {given!r}, and this plugin reads {', '.join(map(repr, FORMATS))}.")
    model, steps = words.get("model"), words.get("steps")
    if not isinstance(model, dict) or not isinstance(steps, list):
        raise Refused(f"{path} lacks its model or its steps: it is no whole recipe.")
    tensors = load_file(folder / "recipe.safetensors")
    read = tuple(_step(step, tensors.get(f"{i}.vector"), f"Step {i} in {path}") for i, step in enumerate(steps))
    return Recipe(name, read, model, fingerprint)


def _step(words: Any, vector: Tensor | None, where: str) -> Step:
    if not isinstance(words, dict) or words.get("kind") not in KINDS:
        kind = words.get("kind") if isinstance(words, dict) else words
        raise Refused(f"{where} has kind {kind!r}, which does not run inside vLLM. What does: {', '.join(KINDS)}.")
    kind, names = words["kind"], KINDS[words["kind"]]
    known = {"kind", "scope", "site", "strength", "birth", "condition_birth", *names}
    if unknown := sorted(set(words) - known):
        raise Refused(f"{where} has keys that are not known: {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
    if (vector is None) != (kind == "scale"):
        raise Refused(f"{where} has {'no vector' if vector is None else 'a vector'} in the safetensors file.")
    layer, site, head = _site(words.get("site"), where)
    bounds = {"low": -math.inf, "high": math.inf}
    numbers = {name: _number(words.get(name), f"{where} has {name}", bounds.get(name)) for name in names}
    strength = _number(words.get("strength"), f"{where} has strength")
    return Step(kind, layer, site, head, strength, numbers, vector, _scope(words.get("scope"), where))


def _site(text: Any, where: str) -> tuple[int, str, int | None]:
    match = _SITE.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[4] not in SITES or match[3] is not None:
        raise Refused(f"{where} has site {text!r}, which cannot be changed inside vLLM. Known: {', '.join(SITES)}.")
    head = None if match[2] is None else int(match[2])
    if (head is not None and match[4] not in ("z", "result")) or (head is None and match[4] == "result"):
        raise Refused(f"{where} has site {text!r}, but only z and result have heads, and result needs one.")
    return int(match[1]), match[4], head


def _scope(words: Any, where: str) -> Scope:
    words = {"phase": words} if isinstance(words, str) else words
    if not isinstance(words, dict):
        raise Refused(f"{where} has scope {words!r}, which is neither a word nor a mapping.")
    if words.get("condition") is not None:
        raise Refused(
            f"{where} asks what the prompt holds (a condition), and a cached prompt has no activations to judge. "
            "Run it with Hugging Face, or give the scope no condition."
        )
    controller = words.get("controller")
    if isinstance(controller, dict) and controller.get("site") is not None:
        raise Refused(
            f"{where} has a controller that predicts by a probe, and what is cached has no activations to read. "
            "Run it with Hugging Face, or take a controller that counts."
        )
    plain = {key: value for key, value in words.items() if key not in ("schedule", "controller", "condition")}
    if unknown := sorted(set(plain) - {field.name for field in fields(Scope)}):
        raise Refused(f"The scope of {where} has keys that are not known: {', '.join(unknown)}.")
    if plain.get("phase", "all") not in PHASES:
        raise Refused(f"{where} has phase {plain['phase']!r}. Known: {', '.join(PHASES)}.")
    if "markers" in plain:
        plain["markers"] = tuple(_ids(ids, where) for ids in plain["markers"])
    if "tokens" in plain:
        plain["tokens"] = _ids(plain["tokens"], where)
    if "window" in plain:
        plain["window"] = tuple(plain["window"])
    return Scope(
        **plain,
        schedule=_part(Schedule, words.get("schedule"), where),
        controller=_part(Controller, controller, where),
    )


def _part(kind: type[T], words: Any, where: str) -> T | None:
    if words is None:
        return None
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(words, dict) or not set(words) <= {*names, "site", "offset"}:
        raise Refused(f"The scope of {where} has {words!r}. Known keys: {', '.join(names)}.")
    held = {n: x if n == "shape" else _number(x, f"{where} has {n}") for n, x in words.items() if n in names}
    return kind(**held)


def _ids(values: Sequence[Any], where: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(i) is int and i >= 0 for i in values):
        raise Refused(f"The scope of {where} has {str(values)[:80]}, which are no token ids.")
    return tuple(values)


def _number(value: Any, where: str, default: float | None = None) -> float:
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Refused(f"{where} {value!r}, which is no finite number.")
    return float(value)
