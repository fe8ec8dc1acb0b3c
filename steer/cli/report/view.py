"""`steer view`: a completion out of a store, token by token, as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

import probes.generation
import steer.recipes
import steer.view
from probes.tables import Table
from steer.cli.loading import model_of
from steer.cli.options import Delimit, DeviceMap, Dtype, Json, end, writable_file

TYPE = "direction:FILE, latents:SAE:6,171, attention:WORDS, confidence, trajectory or experts"


def view_(
    store: Annotated[Path, typer.Argument(help="A JSONL file of completions, as `steer generate` writes it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="An HTML file.")] = Path("chain.html"),
    wanted: Annotated[str | None, typer.Option("--id", help="Of the problem; the first, if left out.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Which of its completions.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="The model that wrote it: without it there are words alone.")
    ] = None,
    track: Annotated[
        list[str] | None, typer.Option(help=f"{TYPE}; may be given several times, and needs --model.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe folder that it was steered by: read under it. Beside one, that one's.")
    ] = None,
    beside: Annotated[
        Path | None, typer.Option(help="Another store: the completion of the same problem there.")
    ] = None,
    rules: Annotated[str | None, typer.Option(help="What cuts the thinking: seal, trimr or organism.")] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    as_json: Json = False,
) -> None:
    """A chain of thought token by token, with tracks on its axis, as one HTML file that needs no network."""
    if model is None and (track or recipe):
        raise typer.BadParameter("--track and --recipe are read off a model: name the one that wrote it, --model.")
    writable_file(output)
    readings = None if track is None else [steer.view.reading_named(name) for name in track]
    steered = None if recipe is None else steer.recipes.Recipe.load(recipe)
    completion = _found(store, wanted, sample)
    other = None if beside is None else _found(beside, completion.id, sample)
    loaded = None if model is None else model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    second = None
    if other is not None:
        second = steer.view.view(
            other, model=loaded, tracks=readings, recipe=steered, rules=rules, name="beside" if steered is None else ""
        )
    first = steered if other is None else None
    shown = steer.view.view(completion, model=loaded, tracks=readings, recipe=first, rules=rules, beside=second)
    path = shown.save(output)
    names = [track.name for side in shown.sides for track in side.tracks]
    rows = (("file", str(path)), ("completion", shown.title), ("tracks", ", ".join(dict.fromkeys(names)) or "none"))
    facts = {"view": str(path), "id": completion.id, "tokens": len(shown.sides[0].texts), "tracks": names}
    end(Table(("View", ""), rows), facts, as_json)


def _found(store: Path, wanted: str | None, sample: int) -> "probes.generation.Completion":
    rows = probes.generation.read_completions(store)
    own = [row for row in rows if row.sample == sample and wanted in (None, row.id)]
    if not own:
        known = ", ".join(list(dict.fromkeys(row.id for row in rows))[:8])
        raise ValueError(
            f"{store} holds no sample {sample} of {wanted or 'any problem'!r}. Its first problems: {known}."
        )
    return own[0]
