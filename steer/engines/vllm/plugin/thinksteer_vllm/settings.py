"""What the server was started with, under `additional_config["thinksteer"]`; the same in every process."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from thinksteer_vllm.machine import Delimiters, Ids, Letters, Machine, Pattern
from thinksteer_vllm.recipes import Recipe, read_recipe
from thinksteer_vllm.refusal import Refused

VERSION = "0.2.0"
KEY = "thinksteer"
STRENGTH = "thinksteer_strength"
ADMITTED = "thinksteer_admitted"  # which the front end sets, and no client may
_KEYS = ("recipes", "delimiters", "fingerprints", "version", "facts", "steps")  # the last two are told to who asks
_WORDS = ("open", "close", "turn", "user", "tool")
_FILES = ("recipe.yaml", "recipe.safetensors")
_READ: dict[int, tuple[Any, "Settings"]] = {}  # with what they were read from, so that no other takes its number


@dataclass(frozen=True, eq=False)
class Settings:
    """Recipes by name, the delimiters of the model, and whether the settings themselves tell the recipes' contents."""

    recipes: Mapping[str, Recipe]
    delimiters: Delimiters = field(default_factory=Delimiters)
    sealed: bool = False

    @property
    def markers(self) -> list[tuple[Ids, ...]]:
        """Those that some scope counts, each once."""
        scopes = [step.scope for recipe in self.recipes.values() for step in recipe.steps]
        return list(dict.fromkeys(scope.markers for scope in scopes if scope.after))

    @cached_property
    def machine(self) -> Machine:
        """What tells phases, and counts these markers."""
        return Machine.of(self.delimiters, self.markers)


def settings_of(vllm_config: Any) -> Settings | None:
    """None where the server was started without recipes. Raises Refused for what cannot be served."""
    extra = vllm_config.additional_config
    given = extra.get(KEY) if isinstance(extra, dict) else None
    if given is None:
        return None
    known = _READ.get(id(given))
    if known is None or known[0] is not given:
        known = _READ[id(given)] = given, _read(given)
    return known[1]


def fingerprint(folder: Path | str) -> str:
    """A checksum of the two files of a recipe."""
    digest = hashlib.sha256()
    for name in _FILES:
        path = Path(folder) / name
        if not path.is_file():
            raise Refused(f"{folder} holds no {name}: it is not a recipe.")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _read(given: Any) -> Settings:
    if not isinstance(given, dict) or not isinstance(given.get("recipes"), dict) or not given["recipes"]:
        raise Refused(f"The setting {KEY!r} is a mapping with recipes, name: folder; but got {str(given)[:80]}.")
    if unknown := sorted(set(given) - set(_KEYS)):
        raise Refused(f"{KEY!r} has settings that are not known: {', '.join(unknown)}. Known: {', '.join(_KEYS)}.")
    if given.get("version", VERSION) != VERSION:
        raise Refused(f"The settings were written for version {given['version']!r} of the plugin, this is {VERSION!r}.")
    prints = given.get("fingerprints", {})
    recipes = {}
    for name, folder in given["recipes"].items():
        own = fingerprint(folder)
        if prints.get(name, own) != own:
            raise Refused(
                f"The recipe {name!r} in {folder} has the fingerprint {own}, but the settings say {prints[name]}: "
                "it has changed since they were written. Write them again."
            )
        recipes[name] = read_recipe(name, Path(folder), own)
    delimiters = _delimiters(given.get("delimiters") or {})
    for recipe in recipes.values():
        if recipe.by_phase and not delimiters.open:
            raise Refused(
                f"The recipe {recipe.name!r} is about phases, but the settings say nothing of delimiters, so they "
                "cannot be told. Give `delimiters`, with the ids that open and close the thinking."
            )
    return Settings(recipes, delimiters, set(prints) == set(recipes) and "version" in given)


def _delimiters(given: Any) -> Delimiters:
    if not isinstance(given, dict) or not set(given) <= set(_WORDS):
        raise Refused(f"delimiters is a mapping of {', '.join(_WORDS)} to token ids; but got {str(given)[:80]}.")
    return Delimiters(**{name: _pattern(name, value) for name, value in given.items()})


def _pattern(name: str, value: Any) -> Pattern:
    if isinstance(value, list) and all(type(i) is int and i >= 0 for i in value):
        return tuple(value)
    if isinstance(value, dict) and name in ("open", "close"):
        return Letters({int(token): tuple(move) for token, move in value.items()})
    raise Refused(f"The delimiter {name!r} is a list of token ids, but got {str(value)[:80]}.")
