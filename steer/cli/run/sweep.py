"""`steer sweep`: a direction's effect over strengths, with its controls."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import probes.directions
import probes.files
import probes.model
import probes.thinking
import steer.evaluation
import steer.interventions
import steer.recipes
import steer.tasks
from steer.cli.options import (
    BatchSize,
    Delimit,
    DeviceMap,
    Dtype,
    Json,
    MaxNewTokens,
    Model,
    Output,
    TaskName,
    Temperature,
    console,
    end,
    sampling_of,
)


def sweep_(
    model: Model,
    positive: Annotated[Path, typer.Option(help="JSONL: completions of ours, or lines of {text}.")],
    negative: Annotated[Path, typer.Option(help="The other class.")],
    site: Annotated[str, typer.Option(help="Such as L2.resid_post.")],
    output: Output,
    strength: Annotated[list[float], typer.Option(help="Fixed in advance, in units of the stream's mean norm.")],
    task: TaskName = "chains",
    scope: Annotated[str, typer.Option(help="all, prompt, thinking or answer.")] = "thinking",
    n_select: int = 400,
    n_report: int = 1000,
    samples: int = 1,
    draws: Annotated[int, typer.Option(help="Of each control.")] = 3,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 64,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Choose a strength on a selection split, report it on another beside its controls, and write its recipe.

    Completions are kept in OUTPUT.completions: a sweep that was killed, started again, goes on where it stopped.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists. Name another output folder, or remove it first.")
    loaded, source = (
        probes.model.load(model, dtype=dtype, device_map=device_map, delimiters=delimiters),
        steer.tasks.task_named(task),
    )
    sampling = sampling_of(loaded, source, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    kept = output.with_name(f"{output.name}.completions")
    contrast = steer.evaluation.LabelledDirection.of(
        loaded,
        probes.thinking.text_spans(loaded, positive),
        probes.thinking.text_spans(loaded, negative),
        probes.model.Site.parse(site),
    )
    touched = steer.recipes.Scope.of(scope)

    def make(direction: "probes.directions.Direction", size: float) -> "steer.recipes.Recipe":
        return steer.recipes.Recipe.of(
            loaded, [steer.interventions.Add.of(direction, size)], scope=touched, method="strength sweep"
        )

    found = steer.evaluation.sweep(
        loaded,
        source,
        contrast,
        make,
        strength,
        select=source.sample(n_select, "select", seed=seed),
        report=source.sample(n_report, "report", seed=seed),
        judge=[*contrast.positive[:50], *contrast.negative[:50]],
        sampling=sampling,
        samples=samples,
        draws=draws,
        batch_size=batch_size,
        store=kept,
        seed=seed,
    )
    facts: dict[str, Any] = {
        "selected": found.selected,
        "kl": found.kl,
        "selection": found.selection.to_dict(),
        "report": found.report.to_dict(),
    }
    with probes.files.staged_folder(output) as stage:
        make(contrast.direction, found.selected).write(stage)
        (stage / "sweep.json").write_text(json.dumps(facts, allow_nan=False, indent=1) + "\n", encoding="utf-8")
    console.print(f"Chosen on the selection split: {found.selected:g}. Its recipe: {output}; completions: {kept}")
    end(found.table(), facts, as_json)
