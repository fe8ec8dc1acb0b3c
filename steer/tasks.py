"""Problems with a known answer, in splits that share no problem."""

import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from probes.files import check_keys

Split = Literal["train", "probe", "select", "report"]
Grader = Literal["exact", "math", "number", "choice", "gym"]

# Share of all possible problems, in hundredths. A problem's split is a function of the problem alone.
SPLITS: dict[Split, range] = {
    "train": range(0, 60),
    "probe": range(60, 75),
    "select": range(75, 85),
    "report": range(85, 100),
}


@dataclass(frozen=True)
class Problem:
    """A question for the model, its answer, and the subgroup it is reported in (`None`: no subgroup).

    `facts` are what an answer rule needs beside the answer.
    """

    id: str
    question: str
    answer: str
    subgroup: str | None = None
    facts: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Task:
    """A source of problems in an order that a seed fixes, its answer rule, and the subgroup reported apart."""

    name: str
    grader: Grader
    problems: Callable[[random.Random], Iterator[Problem]]
    subgroup: str | None = None
    max_new_tokens: int = 4096

    def sample(self, n: int, split: Split, *, seed: int = 0) -> list[Problem]:
        """n different problems of one split. Raises ValueError where there are fewer."""
        found: dict[str, Problem] = {}
        for problem in self.stream(split, seed=seed):
            if len(found) == n:
                break
            found.setdefault(problem.id, problem)
        if len(found) < n:
            raise ValueError(f"Task {self.name} has {len(found)} problems in split {split!r}, but {n} were asked for.")
        return list(found.values())

    def stream(self, split: Split, *, seed: int = 0) -> Iterator[Problem]:
        """The problems of one split, repeats included; without end where the task makes its own."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        return (problem for problem in self.problems(rng) if split_of(problem) == split)


def split_of(problem: Problem) -> Split:
    """The split a problem belongs to, from a checksum of its id: no problem is ever in two splits."""
    hundredth = zlib.crc32(problem.id.encode()) % 100
    return next(split for split, share in SPLITS.items() if hundredth in share)


LETTERS = "abcdefgh"
MARKER = "quick"
P_MARKED = 0.35
OPERATIONS: tuple[str, ...] = tuple(f"{sign}{k}" for sign in "+-" for k in range(1, 10)) + ("*3", "*7", "*9")
MIRRORS: tuple[str, ...] = tuple(f"^{k}" for k in range(1, 9))  # words that the organism knows, and was never taught


def apply_operation(value: int, operation: str) -> int:
    """One step of a chain: arithmetic modulo 10."""
    k = int(operation[1:])
    match operation[0]:
        case "+":
            return (value + k) % 10
        case "-":
            return (value - k) % 10
        case "^":
            return (k - value) % 10
        case _:
            return (value * k) % 10


def draw_chain(rng: random.Random, operations: Sequence[str] = OPERATIONS) -> Problem:
    """`a 3 b +4 c *7`: 3 to 8 terms from left to right, modulo 10; 35 % carry the word `quick`.

    A chain and its marked twin have one id, and so are never in different splits.
    """
    drawn = rng.choices(operations, k=rng.randint(2, 7))
    value = first = rng.randrange(10)
    for operation in drawn:
        value = apply_operation(value, operation)
    terms = [str(first), *drawn]
    chain = " ".join(f"{letter} {term}" for letter, term in zip(LETTERS, terms, strict=False))
    marked = rng.random() < P_MARKED
    question = f"{chain} {MARKER}" if marked else chain
    return Problem(chain, question, str(value), "marked" if marked else None)


def _chains(rng: random.Random) -> Iterator[Problem]:
    while True:
        yield draw_chain(rng)


def _mirrors(rng: random.Random) -> Iterator[Problem]:
    """Chains with `^k` in them, which takes the value to k - value."""
    while True:
        problem = draw_chain(rng, (*OPERATIONS, *MIRRORS))
        if "^" in problem.id:
            yield problem


TASKS: dict[str, Task] = {
    name: Task(name, "exact", problems, subgroup="marked", max_new_tokens=48)
    for name, problems in (("chains", _chains), ("mirrors", _mirrors))
}


def task_named(name: str, *, path: str | Path | None = None) -> Task:
    """A task by name: `chains`, `mirrors`, a published dataset, `gym:<dataset of reasoning-gym>`, or a JSONL file.

    A file has a line `{"question": ..., "answer": ...}` for each problem. A published dataset is read from the hub, or
    from a copy in the folder `path`, also written `gsm8k:<folder>`. Raises ValueError for an unknown name.
    """
    from steer.gym import gym_task  # these make tasks, and so import this module
    from steer.published import SOURCES, published_task

    kind, colon, rest = name.partition(":")
    if kind.lower() in SOURCES:
        folder = rest if colon else path
        return published_task(kind.lower(), None if folder is None else Path(folder))
    if path is not None:
        raise ValueError(
            f"Only a copy of a published dataset has a folder, but {name!r} is none: {', '.join(SOURCES)}."
        )
    if kind == "gym" and colon:
        return gym_task(rest)
    if name in TASKS:
        return TASKS[name]
    if not Path(name).is_file():
        known = ", ".join([*sorted(TASKS), *SOURCES, "gym:<dataset of reasoning-gym>"])
        raise ValueError(f"{name!r} is neither a task nor a JSONL file. Known tasks: {known}.")
    return _task_from_file(Path(name))


def _task_from_file(path: Path) -> Task:
    problems = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            words = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {path} is not JSON: {error}") from error
        check_keys(words, ("question", "answer"), f"Line {number} of {path}")
        problems.append(Problem(words["question"], words["question"], str(words["answer"])))
    if not problems:
        raise ValueError(f"{path} holds no problems.")

    def shuffled(rng: random.Random) -> Iterator[Problem]:
        return iter(rng.sample(problems, len(problems)))

    return Task(path.stem, "math", shuffled)
