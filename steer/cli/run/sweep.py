"""`steer sweep`: a direction's effect over strengths, with its controls."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import probes.directions
import probes.files
import probes.generation
import probes.model
import probes.thinking
import steer.evaluation
import steer.interventions
import steer.recipes
import steer.tasks
from steer.cli.dry import sweep_work, tell
from steer.cli.loading import model_of
from steer.cli.options import (
    BatchSize,
    Count,
    Delimit,
    DeviceMap,
    DryRun,
    Dtype,
    Json,
    MaxNewTokens,
    Model,
    Output,
    Problems,
    Samples,
    Seed,
    TaskName,
    Temperature,
    console,
    end,
    finite,
    free,
    sampling_of,
    split_sizes,
)


def sweep_(
    model: Model,
    positive: Annotated[Path, typer.Option(help="JSONL: completions of ours, or lines of {text}.")],
    negative: Annotated[Path, typer.Option(help="The other class.")],
    site: Annotated[str, typer.Option(help="Such as L2.resid_post.")],
    output: Output,
    strength: Annotated[
        list[float], typer.Option(callback=finite, help="Fixed in advance, in units of the stream's mean norm.")
    ],
    task: TaskName = "chains",
    scope: Annotated[str, typer.Option(help="all, prompt, thinking or answer.")] = "thinking",
    n: Count = 1000,
    n_select: Problems = None,
    n_report: Problems = None,
    samples: Samples = 1,
    draws: Annotated[int, typer.Option(min=0, help="Of each control.")] = 3,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 64,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    dry_run: DryRun = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose a strength on a selection split, report it on another beside its controls, and write its recipe.

    Completions are kept in OUTPUT.completions: a sweep that was killed, started again, goes on where it stopped.
    """
    free(output)
    place, touched, source = probes.model.Site.parse(site), steer.recipes.Scope.of(scope), steer.tasks.task_named(task)
    loaded = model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    sampling = sampling_of(loaded, source, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    kept = output.with_name(f"{output.name}.completions")
    contrast = steer.evaluation.LabelledDirection.of(
        loaded,
        probes.thinking.text_spans(loaded, positive),
        probes.thinking.text_spans(loaded, negative),
        place,
    )
    strengths = list(dict.fromkeys(strength))
    sizes = split_sizes(n, n_select=n_select, n_report=n_report)
    select = source.sample(sizes["n_select"], "select", seed=seed)
    report = source.sample(sizes["n_report"], "report", seed=seed)
    work = sweep_work(len(strengths), draws=draws, samples=samples, **sizes)
    if dry_run:
        tell(work, loaded, [problem.question for problem in select], sampling, batch_size, as_json)
        return

    def make(direction: "probes.directions.Direction", size: float) -> "steer.recipes.Recipe":
        return steer.recipes.Recipe.of(
            loaded, [steer.interventions.Add.of(direction, size)], scope=touched, method="strength sweep"
        )

    with probes.generation.progress(work.completions, label="sweeping"):
        found = steer.evaluation.sweep(
            loaded, source, contrast, make, strengths, select=select, report=report,
            judge=[*contrast.positive[:50], *contrast.negative[:50]], sampling=sampling, samples=samples,
            draws=draws, batch_size=batch_size, store=kept, seed=seed,
        )  # fmt: skip
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
