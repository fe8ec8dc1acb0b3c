"""`steer serve`: a model over HTTP, where each request may name a recipe."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import steer.engines.serving
import steer.recipes
from steer.cli.loading import model_of
from steer.cli.options import Delimit, DeviceMap, Dtype, Json, Model, console, end


def serve_(
    model: Model,
    recipe: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of a recipe; may be given several times.")
    ] = None,
    engine: Annotated[str, typer.Option(help="What generates: transformers.")] = "transformers",
    host: Annotated[str, typer.Option(help="Where to listen; this machine alone, if left out.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is one that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="THINKSTEER_API_KEY", help="What requests must send; none, if left out.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Rows generated at once.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of an answer, at most.")] = 4096,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, and say what would be served.")] = False,
    as_json: Json = False,
) -> None:
    """Answer requests as OpenAI's API has them; each may name one of the recipes, and a strength."""
    served = steer.engines.serving
    if engine not in served.ENGINES:
        raise ValueError(f"--engine {engine} is unknown. Known: {', '.join(served.ENGINES)}.")
    recipes = {name: steer.recipes.Recipe.load(folder) for name, folder in _named(recipe or []).items()}
    if not dry_run:
        served.check_installed()
    address = served.Address(host, port, api_key)
    loaded = model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    service = served.Service(model, loaded, recipes, max_tokens)
    facts = {
        "model": model,
        "engine": engine,
        "recipes": [{key: fact[key] for key in ("name", "steps", "fingerprint")} for fact in service.facts],
        "max_batch": max_batch,
        "max_tokens": max_tokens,
        "api_key": api_key is not None,
    }
    if dry_run:
        end(
            service.table(),
            {"dry_run": True, **facts, "host": host, "port": port, "missing": served.missing()},
            as_json,
        )
        return

    def ready(url: str) -> None:
        console.print(service.table())
        console.print(f"Listening at {url}; Ctrl-C ends it.", highlight=False)
        if as_json:
            console.file.write(json.dumps({**facts, "url": url}) + "\n")
        console.file.flush()

    served.serve(service, address, engine=engine, max_batch=max_batch, ready=ready)


def _named(given: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for words in given:
        name, equals, folder = words.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--recipe {words} has no name: give it as NAME=FOLDER.")
        if name in found:
            raise ValueError(f"--recipe {name} is named twice: {found[name]} and {folder}.")
        found[name] = Path(folder)
    return found
