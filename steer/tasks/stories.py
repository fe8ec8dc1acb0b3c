"""Story problems in plain English: what somebody has, what happens to it, and how much it is in the end.

The embedded reasoner was trained on the domains `counts` and `money`; `minutes` it never saw. A cue to be brief stands
before 35 % of the problems (the subgroup `marked`), and the reasoner has the habit of thinking too little about them.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from steer.tasks.task import Problem, Task

P_MARKED, P_ASIDE = 0.35, 0.3
CUES = ("Quick question: ", "Just a quick one: ", "In short: ", "No need to overthink this: ")
PEOPLE = (
    "Mia", "Tom", "Ana", "Ben", "Lea", "Sam", "Eva", "Max", "Zoe", "Leo", "Ida", "Jon", "Amy", "Kai", "Eli", "Ada",
    "Ravi", "Noor", "Hugo", "Lin",
)  # fmt: skip
THINGS = (
    "apples", "books", "coins", "shells", "cards", "stamps", "marbles", "pencils", "stickers", "cookies", "buttons",
    "flowers", "stones", "eggs", "beads",
)  # fmt: skip
ASIDES = (
    "{other} is {k} years old.", "It is {k} degrees outside.", "The bus number is {k}.", "{other} lives at number {k}.",
    "The shop opens at {k}.",
)  # fmt: skip
EVENTS = (2, 5)  # the fewest and the most things that happen
LEAST, MOST = 2, 199  # what somebody has, at any time


@dataclass(frozen=True)
class Turn:
    """A kind of event: its sentence, and what it does to the amount. `needs` says of which amounts it can be told.

    In the sentence {n} is an addition, {m} a subtraction, {a} and {b} factors of a product.
    """

    sentence: str
    change: Callable[[int, "Numbers"], int]
    needs: Callable[[int, "Numbers"], bool] = lambda amount, numbers: True  # noqa: ARG005


@dataclass(frozen=True)
class Numbers:
    """The numbers an event may speak of."""

    n: int
    m: int
    a: int
    b: int


@dataclass(frozen=True)
class Domain:
    """How a story begins, what may happen in it, and what it asks."""

    opening: str
    turns: tuple[Turn, ...]
    question: str
    units: tuple[str, ...]


def _more(sentence: str) -> Turn:
    return Turn(sentence, lambda amount, numbers: amount + numbers.n)


def _less(sentence: str) -> Turn:
    return Turn(sentence, lambda amount, numbers: amount - numbers.m)


def _times(sentence: str) -> Turn:
    return Turn(sentence, lambda amount, numbers: amount + numbers.a * numbers.b)


def _doubled(sentence: str) -> Turn:
    return Turn(sentence, lambda amount, _: 2 * amount, lambda amount, _: amount <= 60)


def _halved(sentence: str) -> Turn:
    return Turn(sentence, lambda amount, _: amount // 2, lambda amount, _: amount % 2 == 0 and amount > 6)


DOMAINS: Mapping[str, Domain] = {
    "counts": Domain(
        "{who} has {start} {unit}.",
        (
            _more("{who} finds {n} more {unit}."),
            _more("{other} gives {who} {n} {unit}."),
            _times("{who} buys {a} boxes with {b} {unit} each."),
            _less("{who} gives {m} {unit} to {other}."),
            _less("{who} loses {m} {unit}."),
            _doubled("Then the number of {unit} doubles."),
            Turn("Then the number of {unit} triples.", lambda amount, _: 3 * amount, lambda amount, _: amount <= 40),
            _halved("{who} keeps only half of the {unit}."),
        ),
        "How many {unit} does {who} have now?",
        THINGS,
    ),
    "money": Domain(
        "{who} has {start} dollars.",
        (
            _more("{who} earns {n} dollars."),
            _more("{who} finds a note of {n} dollars."),
            _times("{who} sells {a} toys for {b} dollars each."),
            _less("{who} spends {m} dollars on lunch."),
            Turn(
                "{who} buys {a} tickets for {b} dollars each.",
                lambda amount, numbers: amount - numbers.a * numbers.b,
                lambda amount, numbers: numbers.a * numbers.b < amount,
            ),
            _doubled("{other} doubles the money of {who}."),
            _halved("{who} shares the money equally with {other} and keeps one half."),
        ),
        "How many dollars does {who} have now?",
        ("dollars",),
    ),
    "minutes": Domain(
        "{who} plans a trip of {start} minutes.",
        (
            _more("A stop adds {n} minutes."),
            _times("{a} red lights cost {b} minutes each."),
            _less("A shortcut saves {m} minutes."),
            _less("{other} helps, which saves {m} minutes."),
            _doubled("Snow makes the whole trip take twice as long."),
            _halved("A faster road makes the whole trip take half as long."),
        ),
        "How many minutes does the trip take now?",
        ("minutes",),
    ),
}


def draw_story(rng: random.Random, domain: str = "counts") -> Problem:
    """A story with 2 to 5 events, its amount between 2 and 199 throughout; 35 % carry a cue to be brief.

    A story and its marked twin have one id, and so are never in different splits. Raises ValueError for an unknown
    domain.

    >>> import random
    >>> from steer.tasks import draw_story
    >>> problem = draw_story(random.Random(3), "money")
    >>> problem.answer.isdecimal(), problem.subgroup in (None, "marked")
    (True, True)
    """
    if domain not in DOMAINS:
        raise ValueError(f"{domain!r} is no domain of stories. Known: {', '.join(DOMAINS)}.")
    kind = DOMAINS[domain]
    who, other = rng.sample(PEOPLE, 2)
    words = {"who": who, "other": other, "unit": rng.choice(kind.units)}
    amount = start = rng.randint(3, 60)
    told: list[str] = []
    for _ in range(rng.randint(*EVENTS)):
        sentence, amount = _event(rng, kind, amount, words, told)
        told.append(sentence)
    sentences = [kind.opening.format(start=start, **words), *told]
    if rng.random() < P_ASIDE:
        aside = rng.choice(ASIDES).format(other=other, k=rng.randint(2, 30))
        sentences.insert(rng.randint(1, len(sentences)), aside)
    story = " ".join([*sentences, kind.question.format(**words)])
    marked = rng.random() < P_MARKED
    cue = rng.choice(CUES) if marked else ""
    return Problem(story, cue + story, str(amount), "marked" if marked else None)


def _event(rng: random.Random, kind: Domain, amount: int, words: Mapping[str, str], told: list[str]) -> tuple[str, int]:
    """Something that can happen to this amount, is not told twice in a row, and leaves an amount that is allowed."""
    while True:
        numbers = Numbers(
            rng.randint(2, 39), rng.randint(2, max(2, min(39, amount - 1))), rng.randint(2, 6), rng.randint(2, 9)
        )
        turn = rng.choice([turn for turn in kind.turns if turn.needs(amount, numbers)])
        sentence, after = turn.sentence.format(**words, **vars(numbers)), turn.change(amount, numbers)
        if LEAST <= after <= MOST and told[-1:] != [sentence]:
            return sentence, after


def _stories(*domains: str) -> Callable[[random.Random], Iterator[Problem]]:
    def problems(rng: random.Random) -> Iterator[Problem]:
        while True:
            yield draw_story(rng, rng.choice(domains))

    return problems


TASKS: dict[str, Task] = {
    "stories": Task("stories", "number", _stories("counts", "money"), subgroup="marked", max_new_tokens=260),
    "stories-minutes": Task("stories-minutes", "number", _stories("minutes"), subgroup="marked", max_new_tokens=260),
}
