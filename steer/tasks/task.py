"""Problems with a known answer, in splits that share no problem."""

import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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

    >>> from steer.tasks import Problem
    >>> Problem("sum-1", "What is 3 + 4?", "7")
    Problem(id='sum-1', question='What is 3 + 4?', answer='7', subgroup=None)
    """

    id: str
    question: str
    answer: str
    subgroup: str | None = None
    facts: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Task:
    """A source of problems in an order that a seed fixes, its answer rule, and the subgroup reported apart.

    `max_new_tokens` is the limit of a completion, in tokens.

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

    def sample(self, n: int, split: Split, *, seed: int = 0) -> list[Problem]:
        """n different problems of one split. Raises ValueError where there are fewer."""
        problems: dict[str, Problem] = {}
        for problem in self.stream(split, seed=seed):
            if len(problems) == n:
                break
            problems.setdefault(problem.id, problem)
        if len(problems) < n:
            raise ValueError(
                f"Task {self.name} has {len(problems)} problems in split {split!r}, but {n} were asked for."
            )
        return list(problems.values())

    def stream(self, split: Split, *, seed: int = 0) -> Iterator[Problem]:
        """The problems of one split, repeats included; without end where the task makes its own."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        return (problem for problem in self.problems(rng) if split_of(problem) == split)


def split_of(problem: Problem) -> Split:
    """The split a problem belongs to, from a checksum of its id: no problem is ever in two splits.

    >>> from steer.tasks import Problem, split_of
    >>> [split_of(Problem(str(i), "", "")) for i in range(4)]
    ['train', 'select', 'train', 'train']
    """
    hundredth = zlib.crc32(problem.id.encode()) % 100
    return next(split for split, share in SPLITS.items() if hundredth in share)
