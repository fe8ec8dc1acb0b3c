"""`steer generate`: completions of a task's problems."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

import probes.generation
import steer.evaluation
import steer.recipes
import steer.runtime
import steer.tasks
from probes.tables import Table
from steer.cli.dry import Work, tell
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
    Samples,
    Seed,
    SplitName,
    TaskName,
    Temperature,
    end,
    sampling_of,
    split_named,
    writable_file,
)


def generate_(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="A JSONL file; what it holds is not done again.")],
    recipe: Annotated[Path | None, typer.Option(help="A recipe folder, applied at run time.")] = None,
    task: TaskName = "chains",
    n: Count = 100,
    split: SplitName = "probe",
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
    """Completions of a task's problems, as a JSONL file; of the model as it is, or under a recipe."""
    wanted, source = split_named(split), steer.tasks.task_named(task)
    steered = None if recipe is None else steer.recipes.Recipe.load(recipe)
    writable_file(output)
    loaded = model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    sampling = sampling_of(loaded, source, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    problems = source.sample(n, wanted, seed=seed)
    work = Work(n * samples)
    if dry_run:
        tell(work, loaded, [problem.question for problem in problems], sampling, batch_size, as_json)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        probes.generation.progress(work.completions, label="generating"),
        nullcontext() if steered is None else steer.runtime.applied(loaded, steered, must_run=False),
    ):
        done = steer.evaluation.solve(
            loaded, problems, sampling=sampling, samples=samples, batch_size=batch_size, store=output
        )
    truncated = sum(completion.truncated for completion in done)
    length = sum(completion.thinking_tokens for completion in done) / len(done)
    rows = (("completions", len(done)), ("mean thinking tokens", length), ("truncated", truncated))
    end(Table(("Generated", str(output)), rows), dict(rows), as_json)
