"""What the commands share: their options, each with the values that it may have, and how they end."""

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

import probes.generation
import steer.tasks
from probes.tables import Table

if TYPE_CHECKING:
    import transformers

console = Console(width=None if sys.stdout.isatty() else 180)
N = TypeVar("N", float, list[float])


def finite(value: N | None) -> N | None:
    """Refuse what is no number, which no bound does: NaN is neither below nor above it."""
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is no finite number.")
    return value


def _temperature(value: float | None) -> float | None:
    if finite(value) is not None and value is not None and value < 0:
        raise typer.BadParameter(f"{value} is below 0; 0 is greedy.")
    return value


Model = Annotated[
    str,
    typer.Argument(help="A hub id, a folder, a GGUF file, or one that is embedded, such as `organism` or `reasoner`."),
]
TaskName = Annotated[str, typer.Option("--task", help="A task, or a JSONL file of {question, answer}.")]
Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
Count = Annotated[int, typer.Option("--n", "-n", min=1, help="Problems to solve, or to report on.")]
Problems = Annotated[int | None, typer.Option(min=1, help="Problems of this split, if not as many as --n says.")]
Samples = Annotated[int, typer.Option(min=1, help="Completions of each problem.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows generated at once.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write; must not exist.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="The task's own, if left out.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Delimit = Annotated[
    tuple[str, str] | None,
    typer.Option("--delimiters", help="What opens and what closes the thinking, where the tokenizer does not tell."),
]
Temperature = Annotated[
    float | None, typer.Option(callback=_temperature, help="The model's own, if left out; 0 is greedy.")
]
SplitName = Annotated[str, typer.Option("--split", help="train, probe, select or report.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of sampling, and of all that is drawn.")]
Store = Annotated[
    Path | None, typer.Option(help="A folder that keeps the completions: what it holds is not done again.")
]
DeviceMap = Annotated[str | None, typer.Option(help="Where layers go, e.g. auto (accelerate).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say how much would be generated, and how long it takes.")]


def end(table: Table, facts: Mapping[str, Any], as_json: bool) -> None:
    console.print(table)
    if as_json:
        console.file.write(json.dumps(_plain(facts), allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """JSON has no word for a number that is none."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def free(output: Path, kind: str = "folder") -> Path:
    """The output, before any work is done for it. Raises FileExistsError where something is there, and
    NotADirectoryError where a file stands on the way."""
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"{output} exists. Name another output {kind}, or remove it first.")
    return writable(output)


def writable(output: Path) -> Path:
    """Raise NotADirectoryError where a file stands on the way to the output, and PermissionError where that is shut."""
    above = next(parent for parent in (*output.parents, Path()) if parent.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{output} cannot be written: {above} is a file. Name another output.")
    if not os.access(above, os.W_OK):
        raise PermissionError(f"{output} cannot be written: the folder {above} is shut. Name another output.")
    return output


def writable_file(output: Path) -> Path:
    """As `writable`, of a file that may be there. Raises IsADirectoryError for a folder."""
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder. Name a file.")
    return writable(output)


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


def split_sizes(n: int, **given: int | None) -> dict[str, int]:
    """Problems of each split: as many as were given, or else `n`, and for a choice two fifths of it."""
    usual = {"n_probe": n, "n_select": max(1, 2 * n // 5), "n_report": n}
    return {name: usual[name] if size is None else size for name, size in given.items()}


def split_named(name: str) -> "steer.tasks.Split":
    if name not in steer.tasks.SPLITS:
        raise ValueError(f"{name!r} is not a split. Known: {', '.join(steer.tasks.SPLITS)}.")
    return name
