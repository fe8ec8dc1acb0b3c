"""`steer rice`: the experts that go with the start of thinking, reinforced, with their controls."""

import json
from typing import Annotated, Any

import typer

import probes.files
import probes.generation
import steer.decoding
import steer.methods
import steer.recipes
import steer.tasks
from steer.cli.dry import rice_work, tell
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


def rice_(
    model: Model,
    output: Output,
    task: TaskName = "chains",
    top: Annotated[
        list[int] | None, typer.Option(min=1, help="How many experts; several to choose from. The paper: 2.")
    ] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(callback=finite, help="What their weights are multiplied by; several to choose from."),
    ] = None,
    marker: Annotated[
        list[str] | None,
        typer.Option(help="+WORD or -WORD. Left out: what opens the thinking, less what closes it and Alternatively."),
    ] = None,
    scope: Annotated[str, typer.Option(help="all, prompt, thinking or answer; only all folds into weights.")] = "all",
    control: Annotated[
        list[str] | None,
        typer.Option(help="Decoding controls beside it: budget:THINKING[/SOLUTION], wait:N, close:BIAS."),
    ] = None,
    draws: Annotated[int, typer.Option(min=0, help="Of random experts.")] = 3,
    minimum: Annotated[int, typer.Option(min=0, help="An expert chosen less often is not scored.")] = 10,
    n: Count = 1000,
    n_probe: Problems = 300,
    n_select: Problems = None,
    n_report: Problems = None,
    samples: Samples = 1,
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
    """Find the experts that go with the start of thinking, choose how many and how strongly on a selection split, and
    report on another, beside experts of the same load, those scored lowest, and decoding controls.

    Writes the recipe; `steer export` makes a checkpoint of it. Completions are kept in OUTPUT.completions: a run that
    was killed, started again, goes on where it stopped.
    """
    free(output)
    touched = steer.recipes.Scope.of(scope)
    signs = None if marker is None else dict(map(signed, marker))
    controls = {words: steer.decoding.control_named(words) for words in control or ("wait:1", "close:-2")}
    source = steer.tasks.task_named(task)
    loaded = model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    sampling = sampling_of(loaded, source, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    kept = output.with_name(f"{output.name}.completions")
    tops, strengths = (
        list(dict.fromkeys(top or steer.methods.rice.TOP)),
        list(dict.fromkeys(strength or steer.methods.rice.STRENGTHS)),
    )
    splits = split_sizes(n, n_probe=n_probe, n_select=n_select, n_report=n_report)
    sizes: dict[str, Any] = {**splits, "samples": samples}
    work = rice_work(len(tops), len(strengths), len(controls), draws=draws, **sizes)
    if dry_run:
        problems = source.sample(splits["n_probe"], "probe", seed=seed)
        tell(work, loaded, [problem.question for problem in problems], sampling, batch_size, as_json)
        return
    with probes.generation.progress(work.completions, label="finding experts"):
        run = steer.methods.rice.rice(
            loaded, source, signs=signs, top=tops, strengths=strengths, scope=touched, controls=controls,
            draws=draws, minimum=minimum, sampling=sampling, batch_size=batch_size, store=kept, seed=seed, **sizes,
        )  # fmt: skip
    facts = run.to_dict()
    with probes.files.staged_folder(output) as stage:
        run.recipe.write(stage)
        (stage / "rice.json").write_text(json.dumps(facts, allow_nan=False, indent=1) + "\n", encoding="utf-8")
    console.print(run.association.table())
    console.print(f"Chosen on the selection split: {run.selected}. Its recipe: {output}; completions: {kept}")
    end(run.table(), facts, as_json)


def signed(words: str) -> tuple[str, float]:
    """`+Wait` or `-Alternatively`. Raises ValueError for anything else."""
    sign = {"+": 1.0, "-": -1.0}.get(words[:1])
    if sign is None or not words[1:]:
        raise ValueError(f"{words!r} is not a signed marker. Write +WORD or -WORD, such as +Wait.")
    return words[1:], sign
