"""`steer thinkedit`: the main job, from a model to an edited checkpoint."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import probes.generation
import steer.checkpoints
import steer.methods
import steer.report
import steer.tasks
from steer.cli.dry import tell, thinkedit_work
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
    console,
    end,
    finite,
    free,
    sampling_of,
    split_sizes,
)


def _share(value: float) -> float:
    if not 0 < value < 0.5:
        raise typer.BadParameter(f"{value:g} is not above 0 and below 0.5: the two classes would share completions.")
    return value


def _heads(value: list[float] | None) -> list[float] | None:
    for number in finite(value) or ():
        if number <= 0 or (number > 1 and number != int(number)):
            raise typer.BadParameter(f"{number:g} is neither a number of heads nor a share of them, above 0 to 1.")
    return value


def thinkedit_(
    model: Model,
    output: Output,
    task: TaskName = "chains",
    short: Annotated[
        float | None, typer.Option(callback=finite, help="Short: below this many tokens (paper: 100).")
    ] = None,
    long: Annotated[
        float | None, typer.Option(callback=finite, help="Long: above this many tokens (paper: 1000).")
    ] = None,
    share: Annotated[float, typer.Option(callback=_share, help="Without cut-offs: the share on each side.")] = 0.25,
    heads: Annotated[
        list[float] | None, typer.Option(callback=_heads, help="Numbers or shares of heads to choose from.")
    ] = None,
    kind: Annotated[list[str] | None, typer.Option(help="project, replace, one_sided: edits to choose from.")] = None,
    control_draws: Annotated[
        int, typer.Option(min=1, help="Of random heads, and of random directions; they share the problems.")
    ] = 5,
    n: Count = 1000,
    n_probe: Problems = None,
    n_select: Problems = None,
    n_report: Problems = None,
    samples: Samples = 1,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 64,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    sweep: Annotated[int, typer.Option(min=0, help="Problems for the report's sweeps of strength.")] = 0,
    push_to: Annotated[str | None, typer.Option(help="A repository of the hub to upload to; made private.")] = None,
    dry_run: DryRun = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Edit the heads that write short thinking, and export the model (Sun et al. 2025).

    Completions are kept in OUTPUT.completions: a run that was killed, started again, goes on where it stopped.
    """
    if (short is None) != (long is None):
        raise ValueError("Give both --short and --long, or neither (then --share cuts at quantiles).")
    if short is not None and long is not None and short > long:
        raise ValueError(f"--short {short:g} is above --long {long:g}: a completion would be in both classes.")
    settings = steer.methods.thinkedit_run.grid(
        heads or steer.methods.thinkedit_run.HEAD_SHARES,
        [_kind(name) for name in kind] if kind else steer.methods.thinkedit_run.KINDS,
    )
    if all(setting.kind == "one_sided" for setting in settings):
        raise ValueError("--kind one_sided acts at run time and folds into no weights: give another --kind beside it.")
    free(output)
    steer.checkpoints.check_repository(push_to)
    source = steer.tasks.task_named(task)
    loaded = model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    sampling = sampling_of(loaded, source, max_new_tokens=max_new_tokens, temperature=None, seed=seed)
    splits = split_sizes(n, n_probe=n_probe, n_select=n_select, n_report=n_report)
    sizes: dict[str, Any] = {**splits, "samples": samples}
    work = thinkedit_work(settings, n_sweep=sweep, **sizes)
    if dry_run:
        problems = source.sample(splits["n_probe"], "probe", seed=seed)
        tell(work, loaded, [problem.question for problem in problems], sampling, batch_size, as_json)
        return
    with probes.generation.progress(work.completions, label="editing"):
        run = steer.methods.thinkedit_run.thinkedit(
            loaded, source, cutoffs=None if short is None or long is None else (short, long), share=share,
            settings=settings, control_draws=control_draws, sampling=sampling, batch_size=batch_size,
            store=output.with_name(f"{output.name}.completions"), seed=seed, **sizes,
        )  # fmt: skip
        finish(run, output, sweep, batch_size, as_json)
    if push_to is not None:
        steer.checkpoints.push(output, push_to)


def finish(
    run: "steer.methods.thinkedit_run.ThinkEditRun", folder: Path, sweep: int, batch_size: int, as_json: bool
) -> None:
    command = shlex.join(["steer", *sys.argv[1:]])
    changes = steer.report.save(
        run, folder, steer.report.RunRecord.of(run, n=sweep, batch_size=batch_size, command=command)
    )
    console.print(run.recipe.table())
    console.print(changes.table())
    console.print(f"Chosen on the selection split: {run.selected}. Checkpoint and report.html: {folder}")
    end(run.table(), {**run.to_dict(), "checkpoint": str(folder)}, as_json)


def _kind(name: str) -> "steer.methods.thinkedit.Kind":
    if name not in steer.methods.thinkedit_run.KINDS:
        raise ValueError(f"{name!r} is not a kind of edit. Known: {', '.join(steer.methods.thinkedit_run.KINDS)}.")
    return name
