"""The embedded model's own problems: chains of arithmetic modulo 10."""

import random
import re
from collections.abc import Iterator, Sequence

from steer.tasks.task import Problem, Task

LETTERS = "abcdefgh"
MARKER = "quick"
P_MARKED = 0.35
OPERATIONS: tuple[str, ...] = tuple(f"{sign}{k}" for sign in "+-" for k in range(1, 10)) + ("*3", "*7", "*9")
MIRRORS: tuple[str, ...] = tuple(f"^{k}" for k in range(1, 9))  # words that the organism knows, and was never taught


_STEP = re.compile(r"\b([a-h]) (?:([-+*^]\d) )?=(\d)")


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

    >>> import random
    >>> from steer.tasks import draw_chain
    >>> problem = draw_chain(random.Random(0))
    >>> problem.question, problem.answer
    ('a 4 b -7 c +9 d +6 e -2 f +9', '9')
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


def chain_holds(thoughts: Sequence[str]) -> bool | None:
    """Is the last of the organism's thoughts true, such as `b +4 =7` after `a =3`? None where that cannot be told.

    What a letter stands for is what the thoughts before say last of it.

    >>> from steer.tasks import chain_holds
    >>> chain_holds(["Okay a =3", "b +4 =7"]), chain_holds(["a =3", "b +4 =8"]), chain_holds(["Okay a =3"])
    (True, False, None)
    """
    values: dict[str, int] = {}
    verdict: bool | None = None
    for thought in thoughts:
        verdict = None
        for letter, operation, result in _STEP.findall(thought):
            before = values.get(LETTERS[max(LETTERS.index(letter) - 1, 0)]) if operation else None
            values[letter] = int(result)
            if before is not None:
                verdict = apply_operation(before, operation) == int(result) and verdict is not False
    return verdict


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
