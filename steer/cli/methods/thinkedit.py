"""`steer demo` and `steer thinkedit`: the main job, from a model to an edited checkpoint."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

import probes.model
import steer.checkpoints
import steer.methods
import steer.report
import steer.tasks
from steer.cli.options import (
    BatchSize,
    Count,
    Delimit,
    DeviceMap,
    Dtype,
    Json,
    MaxNewTokens,
    Model,
    Output,
    TaskName,
    console,
    end,
    sampling_of,
)


def demo_(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="runs/demo-N, if left out.")] = None,
    n: Count = 1500,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """The main job on the embedded model: probe, derive, choose, edit, export, and compare with the controls."""
    import torch
    import transformers

    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    transformers.utils.logging.disable_progress_bar()
    folder = output or next(p for i in range(1, 1_000_000) if not (p := Path(f"runs/demo-{i}")).exists())
    _finish_thinkedit(
        steer.methods.thinkedit_run.thinkedit("organism", n_report=n, batch_size=256, seed=seed),
        folder,
        200,
        256,
        as_json,
    )


def thinkedit_(
    model: Model,
    output: Output,
    task: TaskName = "chains",
    short: Annotated[float | None, typer.Option(help="Short is below this many tokens (paper: 100).")] = None,
    long: Annotated[float | None, typer.Option(help="Long is above this many tokens (paper: 1000).")] = None,
    share: Annotated[float, typer.Option(help="Without cut-offs: the share on each side.")] = 0.25,
    heads: Annotated[list[float] | None, typer.Option(help="Numbers or shares of heads to choose from.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="project, replace, one_sided: edits to choose from.")] = None,
    control_draws: int = 5,
    n_probe: int = 1000,
    n_select: int = 400,
    n_report: int = 1000,
    samples: int = 1,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 64,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    sweep: Annotated[int, typer.Option(help="Problems for the report's sweeps of strength.")] = 0,
    push_to: Annotated[str | None, typer.Option(help="A repository of the hub to upload to; made private.")] = None,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Edit the heads that write short thinking, and export the model (Sun et al. 2025)."""
    if (short is None) != (long is None):
        raise ValueError("Give both --short and --long, or neither (then --share cuts at quantiles).")
    if output.exists():
        raise FileExistsError(f"{output} exists. Name another output folder, or remove it first.")
    steer.checkpoints.check_repository(push_to)
    loaded, source = (
        probes.model.load(model, dtype=dtype, device_map=device_map, delimiters=delimiters),
        steer.tasks.task_named(task),
    )
    run = steer.methods.thinkedit_run.thinkedit(
        loaded,
        source,
        cutoffs=None if short is None or long is None else (short, long),
        share=share,
        settings=steer.methods.thinkedit_run.grid(
            heads or steer.methods.thinkedit_run.HEAD_SHARES,
            [_kind(name) for name in kind] if kind else steer.methods.thinkedit_run.KINDS,
        ),
        control_draws=control_draws,
        n_probe=n_probe,
        n_select=n_select,
        n_report=n_report,
        samples=samples,
        sampling=sampling_of(loaded, source, max_new_tokens=max_new_tokens, temperature=None, seed=seed),
        batch_size=batch_size,
        seed=seed,
    )
    _finish_thinkedit(run, output, sweep, batch_size, as_json)
    if push_to is not None:
        steer.checkpoints.push(output, push_to)


def _finish_thinkedit(
    run: "steer.methods.thinkedit_run.ThinkEditRun", folder: Path, sweep: int, batch_size: int, as_json: bool
) -> None:
    command = shlex.join(["steer", *sys.argv[1:]])
    changes = steer.report.save(
        run, folder, steer.report.RunRecord.of(run, n=sweep, batch_size=batch_size, command=command)
    )
    steer.report.write_report(folder, folder / "report.html")
    console.print(run.recipe.table())
    console.print(changes.table())
    console.print(f"Chosen on the selection split: {run.selected}. Checkpoint and report.html: {folder}")
    end(run.table(), {**run.to_dict(), "checkpoint": str(folder)}, as_json)


def _kind(name: str) -> "steer.methods.thinkedit.Kind":
    if name not in steer.methods.thinkedit_run.KINDS:
        raise ValueError(f"{name!r} is not a kind of edit. Known: {', '.join(steer.methods.thinkedit_run.KINDS)}.")
    return name
