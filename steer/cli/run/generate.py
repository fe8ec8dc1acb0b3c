"""`steer generate`: completions of a task's problems."""

from pathlib import Path
from typing import Annotated

import typer

import probes.model
import steer.evaluation
import steer.tasks
from probes.tables import Table
from steer.cli.options import (
    BatchSize,
    Count,
    Delimit,
    DeviceMap,
    Dtype,
    Json,
    MaxNewTokens,
    Model,
    SplitName,
    TaskName,
    Temperature,
    end,
    sampling_of,
    split_named,
)


def generate_(
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
    loaded, source = (
        probes.model.load(model, dtype=dtype, device_map=device_map, delimiters=delimiters),
        steer.tasks.task_named(task),
    )
    sampling = sampling_of(loaded, source, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    problems = source.sample(n, split_named(split), seed=seed)
    done = steer.evaluation.solve(
        loaded, problems, sampling=sampling, samples=samples, batch_size=batch_size, store=output
    )
    truncated = sum(completion.truncated for completion in done)
    length = sum(completion.thinking_tokens for completion in done) / len(done)
    rows = (("completions", len(done)), ("mean thinking tokens", length), ("truncated", truncated))
    end(Table(("Generated", str(output)), rows), dict(rows), as_json)
