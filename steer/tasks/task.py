"""Problems with a known answer, in splits that share no problem."""

import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from probes.words import checked

Split = Literal["train", "probe", "select", "report"]
Grader = Literal["exact", "text", "math", "number", "choice", "gym"]

_PATIENCE = 10_000  # draws in a row that bring nothing new, after which a task has no more

# Share of all possible problems, in hundredths. A problem's split is a function of the problem alone.
SPLITS: dict[Split, range] = {
    "train": range(0, 60),
    "probe": range(60, 75),
    "select": range(75, 85),
    "report": range(85, 100),
}


@checked
@dataclass(frozen=True)
class Problem:
    """A question for the model, its answer, and the subgroup it is reported in (`None`: no subgroup).

    `facts` are what an answer rule needs beside the answer; `grader` is the rule, where it is not the task's.

    >>> from steer.tasks import Problem
    >>> Problem("sum-1", "What is 3 + 4?", "7")
    Problem(id='sum-1', question='What is 3 + 4?', answer='7', subgroup=None)
    """

    id: str
    question: str
    answer: str
    subgroup: str | None = None
    facts: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    grader: Grader | None = field(default=None, repr=False)


@checked
@dataclass(frozen=True)
class Task:
    """A source of problems in an order that a seed fixes, its answer rule, and the subgroup reported apart.

    `max_new_tokens` is the limit of a completion, in tokens. `splits` says, by id, the split of each problem of a task
    that has only so many; else a checksum of the id does (`split_of`).

    >>> from steer.tasks import Problem, Task
    >>> def sums(rng):
    ...     while True:
    ...         a, b = rng.randrange(100), rng.randrange(100)
    ...         yield Problem(f"{a}+{b}", f"What is {a} + {b}?", str(a + b))
    >>> [problem.question for problem in Task("sums", "number", sums).sample(2, "report")]
    ['What is 18 + 13?', 'What is 99 + 25?']
    """

    name: str
    grader: Grader
    problems: Callable[[random.Random], Iterator[Problem]]
    subgroup: str | None = None
    max_new_tokens: int = 4096
    splits: Mapping[str, Split] | None = field(default=None, compare=False, repr=False)

    @checked
    def sample(self, n: int, split: Split, *, seed: int = 0) -> list[Problem]:
        """n different problems of one split. Raises ValueError where there are fewer, or none is asked for."""
        if n < 1:
            raise ValueError(f"{n} problems were asked for, but at least 1 is needed.")
        problems: dict[str, Problem] = {}
        idle = 0
        for problem in self.problems(self._rng(split, seed)):
            idle += 1
            if problem.id not in problems and self.split(problem) == split:
                problems[problem.id], idle = problem, 0
            if len(problems) == n or idle > _PATIENCE:
                break
        if len(problems) < n:
            raise ValueError(
                f"Task {self.name} has {len(problems)} problems in split {split!r}, but {n} were asked for."
            )
        return list(problems.values())

    @checked
    def stream(self, split: Split, *, seed: int = 0) -> Iterator[Problem]:
        """The problems of one split, repeats included; without end where the task makes its own."""
        return (problem for problem in self.problems(self._rng(split, seed)) if self.split(problem) == split)

    def split(self, problem: Problem) -> Split:
        """The split of a problem of this task."""
        return split_of(problem) if self.splits is None else self.splits[problem.id]

    def _rng(self, split: Split, seed: int) -> random.Random:
        return random.Random(f"{self.name}/{split}/{seed}")


def shared_out(problems: Sequence[Problem]) -> dict[str, Split]:
    """The split of each of a few problems, by id: shares of what is there, at least one each of four or more.

    In the order of their checksums, so that it depends neither on the order of a file nor on chance.
    """
    order = sorted({problem.id for problem in problems}, key=lambda name: (zlib.crc32(name.encode()), name))
    ends: list[int] = []
    for i, share in enumerate(SPLITS.values(), start=1):
        end = round(share.stop * len(order) / 100)
        if len(order) >= len(SPLITS):  # one each at least
            end = min(max(end, 1 + (ends[-1] if ends else 0)), len(order) - len(SPLITS) + i)
        ends.append(end)
    return {name: next(s for s, end in zip(SPLITS, ends, strict=True) if i < end) for i, name in enumerate(order)}


def split_of(problem: Problem) -> Split:
    """The split a problem belongs to, from a checksum of its id: no problem is ever in two splits.

    >>> from steer.tasks import Problem, split_of
    >>> [split_of(Problem(str(i), "", "")) for i in range(4)]
    ['train', 'select', 'train', 'train']
    """
    hundredth = zlib.crc32(problem.id.encode()) % 100
    return next(split for split, share in SPLITS.items() if hundredth in share)
