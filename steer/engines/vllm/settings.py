"""What a vLLM server with `thinksteer-vllm` is told: recipes by name, and what opens and closes the thinking."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probes.model.delimiters import Delimiters
from probes.needles import Needle
from steer.engines.serving.service import recipes_facts
from steer.recipes.recipe import Recipe

PLUGIN_VERSION = "0.2.0"
_FILES = ("recipe.yaml", "recipe.safetensors")


def serving_settings(recipes: Mapping[str, Path], delimiters: Delimiters | None = None) -> dict[str, Any]:
    """The `additional_config` of a server: `--additional-config` takes it as JSON. A request then names a recipe,
    `vllm_xargs={"thinksteer": "shorter"}`.

    `facts` and `steps` (kind, site, scope) are told to who asks the server. The fingerprints of the recipes go with it,
    so that no compiled graph is taken for that of another recipe. Raises ValueError where a folder is no recipe.

    >>> import torch
    >>> from pathlib import Path
    >>> from probes import Site, load
    >>> from probes.model import delimiters_of
    >>> from steer import Add, Recipe
    >>> from steer.engines.vllm import serving_settings
    >>> model = load("organism")
    >>> Recipe.of(model, [Add(Site(2, "resid_post"), torch.ones(96), 0.5)], scope="thinking").save(Path("shorter"))
    >>> settings = serving_settings({"shorter": Path("shorter")}, delimiters_of(model))["thinksteer"]
    >>> sorted(settings), settings["delimiters"]["open"]
    (['delimiters', 'facts', 'fingerprints', 'recipes', 'steps', 'version'], [3])
    """
    read = {name: Recipe.load(Path(folder)) for name, folder in recipes.items()}
    own = {
        "recipes": {name: str(Path(folder).resolve()) for name, folder in recipes.items()},
        "fingerprints": {name: _fingerprint(Path(folder)) for name, folder in recipes.items()},
        "delimiters": {} if delimiters is None else delimiters_in_words(delimiters),
        "version": PLUGIN_VERSION,
        "facts": recipes_facts(read),
        "steps": {name: [list(row[1:4]) for row in recipe.table().rows] for name, recipe in read.items()},
    }
    return {"thinksteer": own}


def delimiters_in_words(delimiters: Delimiters) -> dict[str, Any]:
    """Each as its ids; one that is found by its text as what each token does to it."""
    names = ("open", "close", "turn", "user", "tool")
    words: dict[str, Any] = {name: list(getattr(delimiters, name)) for name in names}
    for name, needle in (("open", delimiters.open_text), ("close", delimiters.close_text)):
        if needle is not None:
            words[name] = _moves(needle)
    return words


def _moves(needle: Needle) -> dict[str, list[int]]:
    last = needle.last | needle.whole
    columns = [column[:-1].tolist() for column in (needle.starts, needle.inner, needle.length, last)]
    moves = zip(*columns, strict=True)
    return {str(token): list(move) for token, move in enumerate(moves) if move[0] or move[1] or move[3]}


def _fingerprint(folder: Path) -> str:
    """As the plugin takes it: of the files as they are."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in _FILES)).hexdigest()[:16]
