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
class Numbers:
    """The numbers an event may speak of: an addition, a subtraction, and the factors of a product."""

    n: int
    m: int
    a: int
    b: int

    @property
    def product(self) -> int:
        return self.a * self.b


@dataclass(frozen=True)
class Turn:
    """A kind of event: its sentence, and what is done to the amount. `needs` says of which amounts it can be told.

    `sign` is +, -, * or /; `by` a number, or the name of one of `Numbers`, which stand in the sentence in braces.
    """

    sentence: str
    sign: str
    by: int | str
    needs: Callable[[int, Numbers], bool] = lambda amount, numbers: True  # noqa: ARG005


@dataclass(frozen=True)
class Event:
    """What happened to an amount, and its factors where it is a product that is added or taken away."""

    sentence: str
    sign: str
    by: int
    before: int
    factors: tuple[int, int] | None = None

    @property
    def after(self) -> int:
        return {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}[self.sign](
            self.before, self.by
        )


@dataclass(frozen=True)
class Story:
    """A story as it was drawn: `text` is what is told and asked, `cue` what stands before it, or nothing."""

    text: str
    cue: str
    unit: str
    start: int
    events: tuple[Event, ...]

    @property
    def problem(self) -> Problem:
        answer = str(self.events[-1].after)
        return Problem(self.text, self.cue + self.text, answer, "marked" if self.cue else None)


@dataclass(frozen=True)
class Domain:
    """How a story begins, what may happen in it, and what it asks."""

    opening: str
    turns: tuple[Turn, ...]
    question: str
    units: tuple[str, ...]


def _doubled(sentence: str) -> Turn:
    return Turn(sentence, "*", 2, lambda amount, _: amount <= 60)


def _halved(sentence: str) -> Turn:
    return Turn(sentence, "/", 2, lambda amount, _: amount % 2 == 0 and amount > 6)


DOMAINS: Mapping[str, Domain] = {
    "counts": Domain(
        "{who} has {start} {unit}.",
        (
            Turn("{who} finds {n} more {unit}.", "+", "n"),
            Turn("{other} gives {who} {n} {unit}.", "+", "n"),
            Turn("{who} buys {a} boxes with {b} {unit} each.", "+", "product"),
            Turn("{who} gives {m} {unit} to {other}.", "-", "m"),
            Turn("{who} loses {m} {unit}.", "-", "m"),
            _doubled("Then the number of {unit} doubles."),
            Turn("Then the number of {unit} triples.", "*", 3, lambda amount, _: amount <= 40),
            _halved("{who} keeps only half of the {unit}."),
        ),
        "How many {unit} does {who} have now?",
        THINGS,
    ),
    "money": Domain(
        "{who} has {start} dollars.",
        (
            Turn("{who} earns {n} dollars.", "+", "n"),
            Turn("{who} finds a note of {n} dollars.", "+", "n"),
            Turn("{who} sells {a} toys for {b} dollars each.", "+", "product"),
            Turn("{who} spends {m} dollars on lunch.", "-", "m"),
            Turn(
                "{who} buys {a} tickets for {b} dollars each.",
                "-",
                "product",
                lambda amount, numbers: numbers.product < amount,
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
            Turn("A stop adds {n} minutes.", "+", "n"),
            Turn("{a} red lights cost {b} minutes each.", "+", "product"),
            Turn("A shortcut saves {m} minutes.", "-", "m"),
            Turn("{other} helps, which saves {m} minutes.", "-", "m"),
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
    return told(rng, domain).problem


def told(rng: random.Random, domain: str) -> Story:
    """A story with what happens in it, step by step (`draw_story`)."""
    if domain not in DOMAINS:
        raise ValueError(f"{domain!r} is no domain of stories. Known: {', '.join(DOMAINS)}.")
    kind = DOMAINS[domain]
    who, other = rng.sample(PEOPLE, 2)
    words = {"who": who, "other": other, "unit": rng.choice(kind.units)}
    amount = start = rng.randint(3, 60)
    events: list[Event] = []
    for _ in range(rng.randint(*EVENTS)):
        events.append(_event(rng, kind, amount, words, events))
        amount = events[-1].after
    sentences = [kind.opening.format(start=start, **words), *(event.sentence for event in events)]
    if rng.random() < P_ASIDE:
        aside = rng.choice(ASIDES).format(other=other, k=rng.randint(2, 30))
        sentences.insert(rng.randint(1, len(sentences)), aside)
    story = " ".join([*sentences, kind.question.format(**words)])
    cue = rng.choice(CUES) if rng.random() < P_MARKED else ""
    return Story(story, cue, words["unit"], start, tuple(events))


def _event(rng: random.Random, kind: Domain, amount: int, words: Mapping[str, str], before: list[Event]) -> Event:
    """Something that can happen to this amount, is not told twice in a row, and leaves an amount that is allowed."""
    while True:
        numbers = Numbers(
            rng.randint(2, 39), rng.randint(2, max(2, min(39, amount - 1))), rng.randint(2, 6), rng.randint(2, 9)
        )
        turn = rng.choice([turn for turn in kind.turns if turn.needs(amount, numbers)])
        by = turn.by if isinstance(turn.by, int) else getattr(numbers, turn.by)
        factors = (numbers.a, numbers.b) if turn.by == "product" else None
        event = Event(turn.sentence.format(**words, **vars(numbers)), turn.sign, by, amount, factors)
        if LEAST <= event.after <= MOST and [event.sentence] != [e.sentence for e in before[-1:]]:
            return event


def _stories(*domains: str) -> Callable[[random.Random], Iterator[Problem]]:
    def problems(rng: random.Random) -> Iterator[Problem]:
        while True:
            yield draw_story(rng, rng.choice(domains))

    return problems


TASKS: dict[str, Task] = {
    "stories": Task("stories", "number", _stories("counts", "money"), subgroup="marked", max_new_tokens=260),
    "stories-minutes": Task("stories-minutes", "number", _stories("minutes"), subgroup="marked", max_new_tokens=260),
}
