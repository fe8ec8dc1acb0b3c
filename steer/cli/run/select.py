"""`steer select`: which of several completions to trust, told from completions that are there already."""

from pathlib import Path
from typing import Annotated

import typer

import probes.evidence
import probes.fields
import probes.generation
import steer.decoding
import steer.evaluation
import steer.tasks
from steer.cli.loading import model_of
from steer.cli.options import (
    Count,
    Delimit,
    DeviceMap,
    Dtype,
    Json,
    Seed,
    SplitName,
    TaskName,
    console,
    end,
    split_named,
)

BY = probes.evidence.SIGNALS


def select_(
    store: Annotated[Path, typer.Argument(help="A JSONL file of completions, as --store keeps them.")],
    task: TaskName = "chains",
    by: Annotated[
        list[str] | None,
        typer.Option(help=f"A signal: {', '.join(BY)}; brevity, if left out. All but it need --model."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model that wrote them, which signals are read off.")] = None,
    segment: Annotated[int, typer.Option(min=1, help="Tokens of a segment of a chain.")] = 500,
    suffix: Annotated[str, typer.Option(help="What a forced answer begins with, such as 'The answer is '.")] = "",
    n: Count = 1000,
    split: SplitName = "probe",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where the completions go that the best of the first signal is."),
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Majority vote, and by each signal the best of n, a weighted vote, and the first sample that is good enough, all
    on the same completions: how often they are right, and what they cost. What is fitted is cross-validated."""
    wanted = by or ["brevity"]
    if unknown := [name for name in wanted if name not in BY]:
        raise typer.BadParameter(f"--by {unknown[0]!r} is no signal. Known: {', '.join(BY)}.")
    if "failed steps" in wanted:
        raise typer.BadParameter("--by 'failed steps' needs a check of each step, which read_signals takes.")
    names = [name for word in wanted for name in BY if name == word]
    if model is None and set(names) - set(probes.evidence.NEEDS_NO_MODEL):
        raise typer.BadParameter(
            "These signals are read off a model: name the one that wrote the completions, --model."
        )
    if output is not None and output.exists():
        raise FileExistsError(f"{output} exists. Name another file.")
    source = steer.tasks.task_named(task)
    rows = probes.generation.read_completions(store)
    problems = [p for p in source.sample(n, split_named(split), seed=seed) if p.id in {c.id for c in rows}]
    if not problems:
        raise ValueError(
            f"{store} answers none of the first {n} problems of {source.name} in split {split!r}, seed {seed}: give "
            "the task, split and seed that it was made with."
        )
    rows = [c for c in rows if c.id in {p.id for p in problems}]
    loaded = None if model is None else model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    signals = probes.evidence.read_signals(loaded, rows, names, segment=segment, suffix=suffix)
    samples = steer.decoding.Samples.of(
        rows, problems, source, {name: values.tolist() for name, values in signals.items()}
    )
    if samples.votes.shape[1] < 2:
        raise ValueError(f"{store} has one completion of each problem: there is nothing to choose from.")
    found = steer.evaluation.pick_table(samples, steer.evaluation.standard_picks(samples))
    told = steer.evaluation.score_signals(rows, problems, source, signals)
    console.print(told.table())
    if output is not None:
        best = steer.decoding.best_of(samples, names[0]).sample
        groups = probes.generation.by_problem(rows)
        chosen = [sorted(groups[p.id], key=lambda c: c.sample)[at] for p, at in zip(problems, best, strict=True)]
        probes.generation.write_completions(output, chosen)
    end(found.table(), {s.name: probes.fields.plain_fields(s) for s in found.scores}, as_json)
