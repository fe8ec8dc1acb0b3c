"""`steer vector`: differences in weight space, made, added, looked at, and told to mergekit."""

from pathlib import Path
from typing import Annotated

import typer

import probes.files
import steer.checkpoints
import steer.deltas
import steer.recipes
from probes.tables import Table
from steer.cli.loading import check_place, model_of
from steer.cli.options import Json, Output, console, end, finite, free, writable_file

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=__doc__)

Checkpoint_ = Annotated[str, typer.Argument(help="A checkpoint: a folder, or a hub id.")]
Delta = Annotated[
    Path, typer.Argument(help="A folder that `steer vector make` wrote, a LoRA adapter, or a shipped delta.")
]
Strength = Annotated[
    float, typer.Option(callback=finite, help="What the delta is multiplied by; below 0 it is subtracted.")
]
Only = Annotated[list[str] | None, typer.Option(help="Tensors to take, such as 'layers.*.mlp'.")]
Skip = Annotated[list[str] | None, typer.Option(help="Tensors to leave; `embed` is the embedding and the head.")]


@app.command()
def make(
    after: Annotated[str, typer.Argument(help="The checkpoint that learned, a LoRA adapter, or a recipe.")],
    output: Output,
    before: Annotated[
        str | None, typer.Argument(help="The checkpoint it is compared with; none for an adapter.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Keep this many dimensions of each matrix.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 or float16 for half the size.")] = "float32",
    linked: Annotated[bool, typer.Option("--linked", help="Name the checkpoints, store no tensors.")] = False,
    only: Only = None,
    skip: Skip = None,
    as_json: Json = False,
) -> None:
    """AFTER - BEFORE as a folder: its numbers, or of low rank, or as the names of the two."""
    free(output)
    if before is not None:
        check_place(before)
    stored = steer.deltas.dtype_named(dtype)
    if before is not None and (Path(after) / "recipe.yaml").is_file():
        delta = steer.deltas.recipe_delta(model_of(before), steer.recipes.Recipe.load(Path(after)))
    else:
        delta = steer.deltas.open_delta(after) if before is None else steer.deltas.WeightDelta.between(after, before)
    if only or skip:
        delta = delta.selected(only or (), skip or ())
    made = steer.deltas.save(delta, output, rank=rank, dtype=stored, linked=linked)
    kept = [term.source.kept_energy() for term in made.terms if isinstance(term.source, steer.deltas.Stored)]
    facts = {"tensors": len(made.names), "kept energy": kept[0] if kept else 1.0}
    rows = (*facts.items(), *(("note", note) for note in made.notes))
    end(Table(("Delta", str(output)), rows), {**facts, "notes": list(made.notes)}, as_json)


@app.command("add")
def add_(
    target: Checkpoint_,
    delta: Delta,
    output: Output,
    strength: Strength = 1.0,
    only: Only = None,
    skip: Skip = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and what it needs.")] = False,
    push_to: Annotated[str | None, typer.Option(help="A repository of the hub to upload to; made private.")] = None,
    as_json: Json = False,
) -> None:
    """TARGET + strength x DELTA as a checkpoint. Interrupted, the same command goes on at the last whole shard."""
    check_place(target)
    if not dry_run:
        free(output)
    found = steer.deltas.open_delta(delta)
    if dry_run:
        plan = steer.deltas.Plan.of(target, found, strength=strength, only=only or (), skip=skip or ())
        console.print(plan.needs())
    else:
        plan = steer.deltas.add(
            target, found, output, strength=strength, only=only or (), skip=skip or (), push_to=push_to
        )
    facts = {"touched": len(plan.names), "tensors": sorted(plan.names), "bytes": plan.bytes, "notes": list(plan.notes)}
    end(plan.table(), facts, as_json)


@app.command()
def show(
    delta: Delta,
    against: Annotated[list[Path] | None, typer.Option(help="Another delta to compare with.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw it into this HTML file, which needs no network.")] = None,
    as_json: Json = False,
) -> None:
    """Norms per layer and module, and cosines to other deltas."""
    if figure is not None:
        writable_file(figure)
    table = steer.deltas.norms(
        steer.deltas.open_delta(delta), {str(path): steer.deltas.open_delta(path) for path in against or []}
    )
    if figure is not None:
        with probes.files.staged_file(figure) as stage:
            steer.deltas.figure_of(table).write_html(stage, include_plotlyjs=True)
    end(table, {"rows": [dict(zip(table.columns, row, strict=True)) for row in table.rows]}, as_json)


@app.command("to-mergekit")
def to_mergekit_(
    target: Checkpoint_,
    delta: Annotated[Path, typer.Argument(help="A delta made with --linked.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A YAML file; printed, if left out.")] = None,
    strength: Strength = 1.0,
    method: Annotated[str, typer.Option(help="A method of mergekit: linear, ties, slerp and the like.")] = "linear",
    density: Annotated[float | None, typer.Option(help="Share of each difference that ties and dare keep.")] = None,
    dtype: str = "bfloat16",
    as_json: Json = False,
) -> None:
    """The YAML for `mergekit-yaml`: TIES, DARE, SLERP and the like are mergekit's."""
    if output is not None:
        free(output, "file")
    check_place(target)
    text = steer.deltas.to_mergekit(
        steer.checkpoints.Checkpoint.open(target),
        steer.deltas.open_delta(delta),
        strength=strength,
        method=method,
        density=density,
        dtype=dtype,
    )
    if output is not None:
        with probes.files.staged_file(output) as stage:
            stage.write_text(text, encoding="utf-8")
    elif not as_json:
        console.file.write(text)
    if as_json or output is not None:
        rows = (("method", method), ("output", "printed" if output is None else str(output)))
        end(Table(("For mergekit", target), rows), {**dict(rows), "yaml": text}, as_json)
