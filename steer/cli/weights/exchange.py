"""`steer export` and `steer import`: a recipe as a checkpoint, an adapter, or a neighbour's file; and back."""

from pathlib import Path
from typing import Annotated

import typer

import steer.folding
import steer.interop
import steer.recipes
from probes.tables import Table
from steer.cli.loading import model_of
from steer.cli.options import Delimit, DeviceMap, Dtype, Json, Model, Output, end, free

WEIGHTS = ("checkpoint", "adapter")


def export_(
    recipe: Annotated[Path, typer.Argument(help="A recipe folder.")],
    to: Annotated[str, typer.Option(help=f"{', '.join((*steer.interop.FORMATS, *WEIGHTS))}.")],
    output: Output,
    model: Annotated[
        str | None, typer.Option(help="Needed to change weights; else the recipe is checked on it.")
    ] = None,
    push_to: Annotated[str | None, typer.Option(help="A repository of the hub to upload weights to.")] = None,
    public: Annotated[bool, typer.Option("--public", help="A repository made for it is public.")] = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    as_json: Json = False,
) -> None:
    """A recipe as weights, or as the file that another tool steers with."""
    if to not in (*steer.interop.FORMATS, *WEIGHTS):
        raise ValueError(f"{to!r} is nothing to export to. Known: {', '.join((*steer.interop.FORMATS, *WEIGHTS))}.")
    if to in steer.interop.FORMATS and (push_to is not None or public):
        raise ValueError(f"--push-to and --public are for {' and '.join(WEIGHTS)}: {to} is one file.")
    if to in WEIGHTS and model is None:
        raise ValueError(f"--to {to} changes weights: name the model, --model NAME.")
    whole = steer.recipes.Recipe.load(recipe)
    free(output, "file or folder")
    loaded = None if model is None else model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    if to in steer.interop.FORMATS:
        steer.interop.export_recipe(whole, output, to, model=loaded)
    else:
        assert loaded is not None
        write = steer.folding.export if to == "checkpoint" else steer.folding.export_adapter
        write(loaded, whole, output, push_to=push_to, private=not public)
    rows = (("steps", len(whole.steps)), ("format", to), ("output", str(output)))
    end(Table(("Exported", str(recipe)), rows), dict(rows), as_json)


def import_(
    file: Annotated[Path, typer.Argument(help="A neighbour's file.")],
    model: Model,
    output: Output,
    format: Annotated[
        str | None, typer.Option(help=f"{', '.join(steer.interop.FORMATS)}; else told by the file.")
    ] = None,
    shift: Annotated[int, typer.Option(help="-1 for a GGUF file of llama.cpp's own generator.")] = 0,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    as_json: Json = False,
) -> None:
    """A neighbour's file as a recipe for a model."""
    free(output)
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist.")
    loaded = model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    found = steer.interop.import_recipe(file, loaded, format, shift=shift)
    found.save(output)
    end(found.table(), {"steps": len(found.steps), "recipe": str(output)}, as_json)
