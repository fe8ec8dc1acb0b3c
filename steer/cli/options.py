"""What the commands share: their options, and how they end."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import probes.generation
import steer.tasks
from probes.tables import Table

if TYPE_CHECKING:
    import transformers

console = Console(width=None if sys.stdout.isatty() else 180)

Model = Annotated[str, typer.Argument(help="A hub id, a folder, a GGUF file, `organism`, or `smollm2`.")]
TaskName = Annotated[str, typer.Option("--task", help="A task, or a JSONL file of {question, answer}.")]
Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
Count = Annotated[int, typer.Option("--n", "-n", help="Problems to solve, or to report on.")]
BatchSize = Annotated[int, typer.Option(help="Rows generated at once.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write; must not exist.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="The task's own, if left out.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Delimit = Annotated[
    tuple[str, str] | None,
    typer.Option("--delimiters", help="What opens and what closes the thinking, where the tokenizer does not tell."),
]
Temperature = Annotated[float | None, typer.Option(help="The model's own, if left out; 0 is greedy.")]
SplitName = Annotated[str, typer.Option("--split", help="train, probe, select or report.")]
Store = Annotated[
    Path | None, typer.Option(help="A folder that keeps the completions: what it holds is not done again.")
]
DeviceMap = Annotated[str | None, typer.Option(help="Where layers go, e.g. auto (accelerate).")]


def end(table: Table, facts: Mapping[str, Any], as_json: bool) -> None:
    console.print(table)
    if as_json:
        console.file.write(json.dumps(facts) + "\n")


def sampling_of(
    model: "transformers.PreTrainedModel",
    task: "steer.tasks.Task",
    *,
    max_new_tokens: int | None,
    temperature: float | None,
    seed: int,
) -> "probes.generation.Sampling":
    """The model's own sampling, but for what was asked for."""
    sampling = probes.generation.Sampling.of(model, max_new_tokens=max_new_tokens or task.max_new_tokens, seed=seed)
    return sampling if temperature is None else replace(sampling, temperature=temperature)


def split_named(name: str) -> "steer.tasks.Split":
    if name not in steer.tasks.SPLITS:
        raise ValueError(f"{name!r} is not a split. Known: {', '.join(steer.tasks.SPLITS)}.")
    return name
