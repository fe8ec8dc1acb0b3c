"""Files for the neighbours: a recipe as other tools steer with it, and back."""

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType

from transformers import PreTrainedModel

from probes.files import reading
from probes.texts import read_json
from steer.interop.table import FORMATS, Format
from steer.recipes.recipe import Recipe


def export_recipe(recipe: Recipe, path: str | Path, format: str, *, model: PreTrainedModel | None = None) -> None:
    """Write a recipe as a neighbour reads it: `format` is one of `FORMATS`.

    With `model` the recipe is checked against it first. Raises ValueError for a step that the format cannot hold,
    FileExistsError where the file exists. Nothing of a recipe is left out without a word: who applies it, and whether
    at scale 1, is in the format's own module.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, Recipe
    >>> from steer.interop import export_recipe
    >>> recipe = Recipe.of(load("organism"), [Add(Site(2, "resid_post"), torch.ones(96), 0.5)])
    >>> export_recipe(recipe, "steering.pt", "lm-eval")
    >>> list(torch.load("steering.pt", weights_only=True))
    ['layers.2']
    """
    path, known = Path(path), _format(format)
    if path.suffix not in known.suffixes:
        raise ValueError(f"A file of {format} ends in {' or '.join(known.suffixes)}, but got {path.name!r}.")
    if path.exists():
        raise FileExistsError(f"{path} exists. Name another output, or remove it first.")
    if model is not None:
        recipe.check(model)
    write = _module(known).write
    if "model" in signature(write).parameters:
        write(recipe, path, model=model)
    else:
        write(recipe, path)


def import_recipe(path: str | Path, model: PreTrainedModel, format: str | None = None, *, shift: int = 0) -> Recipe:
    """Read a neighbour's file as a recipe for `model`; without `format`, it is told by the name and, in JSON, the keys.

    `shift` moves the layers of a GGUF file: -1 for one that llama.cpp's own generator made. Raises ValueError for a
    file that is damaged, made for another model, or says what no step of ours does.

    >>> import torch
    >>> from probes import load
    >>> from steer.interop import import_recipe
    >>> entry = {"steering_vector": torch.ones(96), "steering_coefficient": 0.5, "action": "add"}
    >>> torch.save({"layers.2": {**entry, "bias": None, "head_index": None}}, "steering.pt")
    >>> import_recipe("steering.pt", load("organism")).table().rows
    ((0, 'add', 'L2.resid_post', 'all', 0.5),)
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file.")
    format = _told(path) if format is None else format
    read: Callable[..., Recipe] = _module(_format(format)).read
    if shift and "shift" not in signature(read).parameters:
        raise ValueError(f"shift is for GGUF files: the layers of {format} are counted from 0.")
    with reading(path, f"file of {format}"):
        return read(path, model, shift=shift) if shift else read(path, model)


def _module(format: Format) -> ModuleType:
    return import_module(f"steer.interop.{format.module}")


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"{name!r} is no format of a neighbour. Known: {', '.join(FORMATS)}.")
    return FORMATS[name]


def _told(path: Path) -> str:
    names = [name for name, known in FORMATS.items() if path.suffix in known.suffixes]
    if path.suffix == ".json":
        whole = read_json(path)
        first = whole[0] if isinstance(whole, list) and whole else whole
        keys = first if isinstance(first, dict) else {}
        names = [name for name in names if FORMATS[name].key in keys]
    if len(names) != 1:
        raise ValueError(f"What {path} is, its name and keys do not tell. Name the format: {', '.join(FORMATS)}.")
    return names[0]
