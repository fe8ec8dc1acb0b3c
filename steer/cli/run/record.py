"""`steer record` and `steer experts`: statistics over completions, read by one worker or several."""

from pathlib import Path
from typing import Annotated

import typer

import probes.activations
import probes.generation
import probes.model
import probes.scaling
import probes.thinking
from probes.tables import Table
from steer.cli.loading import opened
from steer.cli.options import Delimit, Dtype, Json, Model, console, end, free

Completions = Annotated[Path, typer.Argument(help="A JSONL file of completions, such as `steer generate` writes.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="A safetensors file; must not exist.")]
Sites = Annotated[list[str], typer.Option("--site", help="Such as L2.resid_post; may be given several times.")]
Markers = Annotated[list[str] | None, typer.Option("--marker", help="A word to count at; may be given several times.")]
WorkerCount = Annotated[int, typer.Option("--workers", min=1, help="Processes, one model each; several want Ray.")]
Cpus = Annotated[int, typer.Option(min=1, help="Threads of each worker.")]
Gpus = Annotated[float, typer.Option(min=0, help="Share of a GPU of each worker.")]
ShardTokens = Annotated[int, typer.Option(min=1, help="Tokens of a shard, which is read at once.")]
Shards = Annotated[Path | None, typer.Option("--store", help="A folder that keeps shards: they are not read again.")]
Address = Annotated[str | None, typer.Option(help="Of a cluster of Ray; one is started here, if left out.")]


def record_(
    model: Model,
    completions: Completions,
    output: Output,
    site: Sites,
    position: Annotated[str, typer.Option(help="thinking, first or last.")] = "thinking",
    keep_sinks: Annotated[bool, typer.Option("--keep-sinks", help="Leave no attention sinks out.")] = False,
    workers: WorkerCount = 1,
    cpus: Cpus = 1,
    gpus: Gpus = 0,
    shard_tokens: ShardTokens = 16_384,
    store: Shards = None,
    address: Address = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Means and norms of activations at sites, over a file of completions."""
    free(output, "file")
    sites, at = [probes.model.Site.parse(name) for name in site], probes.thinking.position_named(position, "completion")
    spans = [at(completion) for completion in probes.generation.read_completions(completions)]
    pool = probes.scaling.spread(
        model, workers, cpus=cpus, gpus=gpus, shard_tokens=shard_tokens, store=store, dtype=dtype, address=address
    )
    with opened(model, dtype, pool) as reader:
        found = reader.record(spans, sites, keep_sinks=keep_sinks)
    about = {"model": model, "completions": str(completions), "position": position, "keep_sinks": keep_sinks}
    probes.scaling.save_statistics(output, found, about)
    rows = tuple(
        (str(own), of.activation.count, float(of.activation.mean.norm()), float(of.norm.mean), of.left_out)
        for own, of in found.items()
    )
    columns = ("site", "spans", "norm of the mean", "mean norm", "sinks left out")
    facts = {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows}
    end(Table(columns, rows, f"Recorded: {output}"), {"sites": facts, "workers": workers}, as_json)


def experts_(
    model: Model,
    completions: Completions,
    output: Output,
    marker: Markers = None,
    top: Annotated[int, typer.Option(min=1, help="Experts to show.")] = 10,
    workers: WorkerCount = 1,
    cpus: Cpus = 1,
    gpus: Gpus = 0,
    shard_tokens: ShardTokens = 16_384,
    store: Shards = None,
    address: Address = None,
    dtype: Dtype = "auto",
    delimiters: Delimit = None,
    as_json: Json = False,
) -> None:
    """How often each expert of a sparse model is chosen, by class of tokens, over a file of completions."""
    free(output, "file")
    rows = probes.generation.read_completions(completions)
    pool = probes.scaling.spread(
        model, workers, cpus=cpus, gpus=gpus, shard_tokens=shard_tokens, store=store, dtype=dtype,
        delimiters=delimiters, address=address,
    )  # fmt: skip
    with opened(model, dtype, pool) as reader:
        counts = reader.count_experts(rows, marker or ())
    probes.scaling.save_statistics(output, counts, {"model": model, "completions": str(completions)})
    if counts.lacking:
        console.print(f"Not in the vocabulary: {', '.join(counts.lacking)}.", highlight=False)
    whole = counts.table()
    facts = {"tokens": dict(zip(counts.classes, counts.tokens.tolist(), strict=True)), "workers": workers}
    end(Table(whole.columns, whole.rows[:top], whole.title), facts | {"lacking": list(counts.lacking)}, as_json)
