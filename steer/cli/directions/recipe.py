"""`steer recipe`: from directions to the recipe that the other commands take."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

import probes.directions
import probes.model
import steer.interventions
import steer.recipes
from steer.cli.loading import model_of
from steer.cli.options import Delimit, DeviceMap, Dtype, Json, Model, Output, end, finite, free

if TYPE_CHECKING:
    import transformers


def recipe_(
    model: Model,
    output: Output,
    add: Annotated[list[Path] | None, typer.Option(help="A direction to add; may be given several times.")] = None,
    ablate: Annotated[list[Path] | None, typer.Option(help="A direction to remove; likewise.")] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(callback=finite, help="One for all, or for each, --add first; else 1."),
    ] = None,
    units: Annotated[
        str, typer.Option(help="Of what is added: stream (the stream's mean norm is 1) or raw (the direction's own).")
    ] = "stream",
    layers: Annotated[
        str | None, typer.Option(help="Such as 10-20 or 4,8: there, and not at the direction's own layer.")
    ] = None,
    scope: Annotated[str, typer.Option(help="all, prompt, thinking or answer.")] = "all",
    window: Annotated[
        str | None, typer.Option(help="Positions of the thinking, such as 0-100, or 100- for all from there on.")
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    as_json: Json = False,
) -> None:
    """Directions, added or ablated, as a recipe: what generate, compare, evaluate and export take."""
    free(output)
    files = [*((path, True) for path in add or ()), *((path, False) for path in ablate or ())]
    if not files:
        raise ValueError("Give at least one direction, --add FILE or --ablate FILE: `steer direction` makes them.")
    kind = _units(units)
    sizes = _sizes(strength or [1.0], len(files))
    named, where = None if layers is None else _layers(layers), _scope(scope, window)
    directions = [probes.directions.Direction.load(path) for path, _ in files]
    loaded = model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    steps = []
    for (path, added), direction, size in zip(files, directions, sizes, strict=True):
        _check_birth(loaded, direction, path)
        for placed in _placed(direction, named):
            steps.append(
                steer.interventions.Add.of(placed, size, units=kind)
                if added
                else steer.interventions.Ablate.of(placed, size)
            )
    made = steer.recipes.Recipe.of(loaded, steps, scope=where)
    made.check(loaded)
    made.save(output)
    end(made.table(), {"steps": len(made.steps), "recipe": str(output)}, as_json)


def _units(name: str) -> "steer.interventions.Units":
    if name not in (known := get_args(steer.interventions.Units)):
        raise ValueError(f"{name!r} is no unit. Known: {', '.join(known)}.")
    return cast("steer.interventions.Units", name)


def _sizes(strengths: Sequence[float], n: int) -> Sequence[float]:
    if len(strengths) not in (1, n):
        raise ValueError(f"{len(strengths)} of --strength came with {n} directions: give one, or one for each.")
    return list(strengths) * (n if len(strengths) == 1 else 1)


def _layers(text: str) -> list[int]:
    """`10-20` with both ends, `4,8`, or both: `0,4-6`."""
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip(), re.ASCII)
        first, last = (0, -1) if found is None else (int(found[1]), int(found[2] or found[1]))
        if last < first or last - first > 9999:
            raise ValueError(f"--layers {text} is no set of layers. Write 10-20, or 4,8.")
        layers += range(first, last + 1)
    return sorted(set(layers))


def _scope(phase: str, window: str | None) -> "steer.recipes.Scope":
    scope = steer.recipes.Scope.of(phase)
    if window is None:
        return scope
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})?", window, re.ASCII)
    if found is None:
        raise ValueError(f"--window {window} is no range of positions. Write 0-100, or 100- for all from there on.")
    return replace(scope, window=(int(found[1]), None if found[2] is None else int(found[2])))


def _placed(direction: "probes.directions.Direction", layers: list[int] | None) -> "list[probes.directions.Direction]":
    """The direction at its own layer, or as it is at others."""
    if layers is None:
        return [direction]
    return [replace(direction, site=replace(direction.site, layer=layer)) for layer in layers]


def _check_birth(model: "transformers.PreTrainedModel", direction: "probes.directions.Direction", path: Path) -> None:
    here, there = probes.model.identity_of(model), direction.provenance.model
    if different := [key for key in ("model_type", "n_layers", "d_model") if there.get(key) != here[key]]:
        facts = ", ".join(f"{key} {there.get(key)} there, {here[key]} here" for key in different)
        raise ValueError(f"{path} was made on the model {there.get('name')!r}, not on {here['name']!r}: {facts}.")
