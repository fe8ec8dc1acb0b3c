"""`steer serve`: a model over HTTP, where each request may name a recipe."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import steer.engines.serving
import steer.engines.vllm
import steer.recipes
from probes.tables import Table
from steer.cli.loading import check_source, model_of
from steer.cli.options import Delimit, DeviceMap, Dtype, Json, Model, console, end

_ENGINES = ("transformers", "vllm")
_BEHIND = "What stands behind a --"


def serve_(
    model: Model,
    options: Annotated[
        list[str] | None, typer.Argument(help="Behind a --, vLLM's own options, such as --max-model-len 4096.")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of a recipe; may be given several times.")
    ] = None,
    engine: Annotated[str, typer.Option(help="What generates: transformers, or vllm.")] = "transformers",
    host: Annotated[str, typer.Option(help="Where to listen; this machine alone, if left out.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is one that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="THINKSTEER_API_KEY", help="What requests must send; none, if left out.")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Rows generated at once: 32, or as many as vLLM thinks.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="New tokens of an answer, at most: 4096, or as many as fit in vLLM.")
    ] = None,
    probes: Annotated[
        int | None, typer.Option(min=0, help="Prompts that vLLM must answer as the run time does: 2; 0 is not to ask.")
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, and say what would be served.")] = False,
    as_json: Json = False,
) -> None:
    """Answer requests as OpenAI's API has them; each may name one of the recipes, and a strength."""
    if engine not in _ENGINES:
        raise ValueError(f"--engine {engine} is unknown. Known: {', '.join(_ENGINES)}.")
    _check_fits(engine, {"--max-tokens": max_tokens, "--probes": probes, _BEHIND: options or None})
    folders = _named(recipe or [])
    address = steer.engines.serving.Address(host, port, api_key)
    facts = {"model": model, "engine": engine, "host": host, "port": port, "api_key": api_key is not None}
    if engine == "vllm":
        vllm = steer.engines.vllm
        vllm.check_options(options or [])
        if not dry_run:
            vllm.check_vllm()
        check_source(model)
        plan = vllm.plan_of(
            model,
            folders,
            lambda dtype: model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters),
            dtype=dtype,
            delimiters=delimiters,
            options=options or (),
            n_probes=2 if probes is None else probes,
        )
        facts |= {"recipes": _short(plan.facts), "dtype": plan.dtype, "max_batch": max_batch}
        if dry_run:
            return _would(plan.table(), facts, vllm.missing_for_vllm(), as_json)
        return vllm.serve_vllm(plan, address, max_batch=max_batch, ready=_Ready(plan.table(), facts, as_json))
    served, recipes = steer.engines.serving, {name: steer.recipes.Recipe.load(own) for name, own in folders.items()}
    if not dry_run:
        served.check_installed()
    loaded = model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    service = served.Service(model, loaded, recipes, max_tokens or 4096)
    max_batch = max_batch or 32
    facts |= {"recipes": _short(service.facts), "max_batch": max_batch, "max_tokens": service.max_tokens}
    if dry_run:
        return _would(service.table(), facts, served.missing(), as_json)
    ready = _Ready(service.table(), facts, as_json)
    return served.serve(service, address, engine=engine, max_batch=max_batch, ready=ready)


class _Ready:
    """Says what is served, once it is, and where."""

    def __init__(self, table: Table, facts: Mapping[str, Any], as_json: bool) -> None:
        self.table, self.facts, self.as_json = table, facts, as_json

    def __call__(self, url: str, probe: Table | None = None) -> None:
        console.print(self.table)
        if probe is not None:
            console.print(probe)
        console.print(f"Listening at {url}; Ctrl-C ends it.", highlight=False)
        if self.as_json:
            found = (
                {} if probe is None else {"probe": [dict(zip(probe.columns, row, strict=True)) for row in probe.rows]}
            )
            told = {key: value for key, value in self.facts.items() if key not in ("host", "port")}
            console.file.write(json.dumps({**told, **found, "url": url}) + "\n")
        console.file.flush()


def _would(table: Table, facts: Mapping[str, Any], missing: Sequence[str], as_json: bool) -> None:
    end(table, {"dry_run": True, **facts, "missing": list(missing)}, as_json)


def _check_fits(engine: str, given: Mapping[str, object]) -> None:
    """Raise ValueError for what one engine alone reads, given to the other."""
    others, there = (("--max-tokens",), "transformers") if engine == "vllm" else (("--probes", _BEHIND), "vllm")
    for name in others:
        if given[name] is not None:
            raise ValueError(f"{name}: --engine {there} alone reads it. Leave it out, or take that engine.")


def _short(facts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: fact[key] for key in ("name", "steps", "fingerprint")} for fact in facts]


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
