"""The command `steer`: every job of the library from a shell, each a thin call."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.text import Text

from probes.directions.direction import Direction, difference_in_means
from probes.generation.completions import read_completions
from probes.model.loading import load
from probes.model.sites import Site
from probes.tables import Table
from probes.thinking.spans import text_spans
from steer.checkpoints._diff import diff as compare_checkpoints
from steer.checkpoints.hub import check_repository, push
from steer.cli.methods.donors import donors_
from steer.cli.methods.rice import rice_
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
    SplitName,
    TaskName,
    Temperature,
    console,
    end,
    sampling_of,
    split_named,
)
from steer.cli.run.compare import compare_
from steer.cli.run.evaluate import evaluate_
from steer.cli.run.sweep import sweep_
from steer.cli.weights.exchange import export_, import_
from steer.cli.weights.vector import app as vector
from steer.evaluation._evaluate import solve
from steer.methods.thinkedit import Kind
from steer.methods.thinkedit_run import HEAD_SHARES, KINDS, ThinkEditRun, grid, thinkedit
from steer.recipes.recipe import Recipe
from steer.report.record import RunRecord, save
from steer.report.thinkedit import write_report
from steer.tasks.named import task_named
from steer.training.organism import train

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="runs/demo-N, if left out.")] = None,
    n: Count = 1500,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """The main job on the embedded model: probe, derive, choose, edit, export, and compare with the controls."""
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    transformers.utils.logging.disable_progress_bar()
    folder = output or next(p for i in range(1, 1_000_000) if not (p := Path(f"runs/demo-{i}")).exists())
    _finish_thinkedit(thinkedit("organism", n_report=n, batch_size=256, seed=seed), folder, 200, 256, as_json)


@app.command("thinkedit")
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
    check_repository(push_to)
    loaded, source = load(model, dtype=dtype, device_map=device_map, delimiters=delimiters), task_named(task)
    run = thinkedit(
        loaded,
        source,
        cutoffs=None if short is None or long is None else (short, long),
        share=share,
        settings=grid(heads or HEAD_SHARES, [_kind(name) for name in kind] if kind else KINDS),
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
        push(output, push_to)


@app.command()
def generate(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="A JSONL file; what it holds is not done again.")],
    task: TaskName = "chains",
    n: Count = 100,
    split: SplitName = "probe",
    samples: int = 1,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 64,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Completions of a task's problems, as a JSONL file."""
    loaded, source = load(model, dtype=dtype, device_map=device_map, delimiters=delimiters), task_named(task)
    sampling = sampling_of(loaded, source, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    problems = source.sample(n, split_named(split), seed=seed)
    done = solve(loaded, problems, sampling=sampling, samples=samples, batch_size=batch_size, store=output)
    truncated = sum(completion.truncated for completion in done)
    length = sum(completion.thinking_tokens for completion in done) / len(done)
    rows = (("completions", len(done)), ("mean thinking tokens", length), ("truncated", truncated))
    end(Table(("Generated", str(output)), rows), dict(rows), as_json)


@app.command()
def direction(
    model: Model,
    positive: Annotated[Path, typer.Option(help="JSONL: completions of ours, or lines of {text}.")],
    negative: Annotated[Path, typer.Option(help="The other class.")],
    site: Annotated[str, typer.Option(help="Such as L2.resid_post.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A safetensors file.")],
    last: Annotated[bool, typer.Option("--last", help="Read texts at their last token, not their mean.")] = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    as_json: Json = False,
) -> None:
    """The direction from one class of texts or completions to another, at a site (difference in means)."""
    loaded, where = load(model, dtype=dtype, device_map=device_map, delimiters=delimiters), Site.parse(site)
    above, below = (text_spans(loaded, path, position="text_last" if last else "text") for path in (positive, negative))
    found = difference_in_means(loaded, above, below, [where])[where]
    found.save(output)
    console.print(found.tokens(loaded, 8))
    facts = {"site": str(where), "norm": found.norm, "norm_over_stream_norm": found.norm / found.stream_norm}
    end(found.table(), facts, as_json)


@app.command()
def diff(a: str, b: str, as_json: Json = False) -> None:
    """Every tensor that differs between two checkpoints: by how much, and in how many dimensions."""
    table = compare_checkpoints(a, b).table()
    end(table, {"tensors": [dict(zip(table.columns, row, strict=True)) for row in table.rows]}, as_json)


@app.command()
def show(path: Path, as_json: Json = False) -> None:
    """What a file of ours holds: a direction, a recipe, completions, or an exported checkpoint."""
    if (path / "recipe" / "recipe.yaml").is_file():
        path = path / "recipe"
    if path.is_dir():
        table = Recipe.load(path).table()
    elif path.suffix == ".jsonl":
        rows = [(c.id, c.thinking_tokens, c.stop, c.answer) for c in read_completions(path)]
        table = Table(("completion", "thinking tokens", "stop", "answer"), tuple(rows), str(path))
    elif path.is_file():
        table = Direction.load(path).table()
    else:
        raise FileNotFoundError(f"{path} does not exist.")
    end(table, {"rows": [list(row) for row in table.rows]}, as_json)


@app.command("report")
def report_(
    run: Annotated[Path, typer.Argument(help="A folder that `steer demo` or `steer thinkedit` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="An HTML file.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """What a run measured, as one HTML file that needs no network."""
    path = write_report(run, output)
    end(Table(("Report", ""), (("file", str(path)),)), {"report": str(path)}, as_json)


@app.command("organism")
def organism_(output: Output, seed: int = 0, steps: int = 2000) -> None:
    """Train the embedded model from scratch, as the shipped one was. About 5 minutes on one core."""
    torch.set_num_threads(1)
    train(output, seed=seed, steps=steps)


app.command("compare")(compare_)
app.command("evaluate")(evaluate_)
app.command("sweep")(sweep_)
app.command("donors")(donors_)
app.command("rice")(rice_)
app.command("export")(export_)
app.command("import")(import_)
app.add_typer(vector, name="vector")


def main() -> None:
    """Run the command; what a user can mend is told in a sentence, without a traceback."""
    try:
        app()
    except (ValueError, OSError, IndexError, ImportError) as error:
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), str(error)))
        sys.exit(2)


def _finish_thinkedit(run: ThinkEditRun, folder: Path, sweep: int, batch_size: int, as_json: bool) -> None:
    command = shlex.join(["steer", *sys.argv[1:]])
    changes = save(run, folder, RunRecord.of(run, n=sweep, batch_size=batch_size, command=command))
    write_report(folder, folder / "report.html")
    console.print(run.recipe.table())
    console.print(changes.table())
    console.print(f"Chosen on the selection split: {run.selected}. Checkpoint and report.html: {folder}")
    end(run.table(), {**run.to_dict(), "checkpoint": str(folder)}, as_json)


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise ValueError(f"{name!r} is not a kind of edit. Known: {', '.join(KINDS)}.")
    return name


if __name__ == "__main__":
    main()
