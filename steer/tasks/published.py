"""Published datasets as tasks: where each is on the Hugging Face hub, and how its rows are read."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.tasks.answers import last_boxed, number_of
from steer.tasks.task import Grader, Problem, Task

Row = Mapping[str, Any]
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
LETTER = "\nPlease reason step by step, and put the letter of your answer within \\boxed{}."


@dataclass(frozen=True)
class Dataset:
    """A dataset on the hub, the fields of its rows that are read, and what makes a problem of a row.

    `read` raises ValueError, with the rest of a sentence about the row, where the answer is not in the dataset's form.
    """

    hub: str
    config: str | None
    split: str
    fields: tuple[str, ...]
    grader: Grader
    read: Callable[[Row, random.Random], Problem]


def published_task(name: str, path: Path | None = None) -> Task:
    """The task of a known dataset, from the hub, or from a folder that holds a copy of it (JSONL, CSV, parquet).

    Raises ValueError where the folder holds no rows, another split, or rows of other fields.
    """
    source = SOURCES[name]
    where = source.hub if path is None else str(path)
    rows = _rows(source, path)
    if not rows:
        raise ValueError(f"{where} holds no problems.")
    if missing := [field for field in source.fields if field not in rows[0]]:
        raise ValueError(
            f"{where} is no {name}: its rows lack {', '.join(map(repr, missing))}. They have: {', '.join(rows[0])}."
        )

    def problems(rng: random.Random) -> Iterator[Problem]:
        key = rng.random()
        for number in rng.sample(range(len(rows)), len(rows)):
            try:
                yield source.read(rows[number], random.Random(f"{key}/{number}"))
            except ValueError as error:
                raise ValueError(f"Row {number} of {where} {error}") from error

    return Task(name, source.grader, problems)


def _rows(source: Dataset, path: Path | None) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Published datasets are read by datasets: pip install 'thinksteer[tasks]'.") from error
    if path is None:
        return list(datasets.load_dataset(source.hub, source.config, split=source.split))
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder. Name one that holds a copy of {source.hub}.")
    if not any(file.stat().st_size for file in path.rglob("*") if file.is_file()):
        raise ValueError(f"{path} holds no problems.")
    configs = datasets.get_dataset_config_names(str(path))
    splits = datasets.load_dataset(str(path), source.config if source.config in configs else None)
    if source.split not in splits:
        raise ValueError(f"{path} has no split {source.split!r}. It has: {', '.join(splits)}.")
    return list(splits[source.split])


def _gsm8k(row: Row, _: random.Random) -> Problem:
    """The answer stands after the last `####`, with commas between thousands."""
    _, hashes, answer = row["answer"].rpartition("####")
    if not hashes or number_of(answer) is None:
        raise ValueError("has no number after '####' in its answer.")
    return Problem(row["question"], row["question"] + BOXED, answer.strip().replace(",", ""))


def _math(row: Row, _: random.Random) -> Problem:
    """The answer is TeX; a box around it is taken off."""
    answer = str(row["answer"])
    return Problem(row["problem"], row["problem"] + BOXED, last_boxed(answer) or answer)


def _aime(row: Row, _: random.Random) -> Problem:
    """The answer is an integer from 0 to 999, at times with zeros before it."""
    answer = str(row["answer"]).strip()
    if not answer.isdecimal() or int(answer) > 999:
        raise ValueError(f"has the answer {answer!r}, but one of AIME is an integer from 0 to 999.")
    return Problem(row["problem"], row["problem"] + BOXED, str(int(answer)))


def _gpqa(row: Row, rng: random.Random) -> Problem:
    """Four choices, shuffled; the answer is the letter of the right one. The id is the question without them."""
    right, *wrong = (str(row[field]).strip() for field in _CHOICES)
    choices = rng.sample([right, *wrong], 4)
    lines = [f"{letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
    question = str(row["Question"]).strip()
    return Problem(question, "\n".join([question, "", *lines]) + LETTER, "ABCD"[choices.index(right)])


_CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_PROBLEM = ("problem", "answer")
SOURCES: dict[str, Dataset] = {
    "gsm8k": Dataset("openai/gsm8k", "main", "test", ("question", "answer"), "number", _gsm8k),
    "math-500": Dataset("HuggingFaceH4/MATH-500", None, "test", _PROBLEM, "math", _math),
    "aime": Dataset("AI-MO/aimo-validation-aime", None, "train", _PROBLEM, "number", _aime),
    "aime-2024": Dataset("HuggingFaceH4/aime_2024", None, "train", _PROBLEM, "number", _aime),
    "gpqa": Dataset("Idavidrein/gpqa", "gpqa_diamond", "train", ("Question", *_CHOICES), "choice", _gpqa),
}
