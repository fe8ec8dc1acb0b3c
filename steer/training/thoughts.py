"""Thinking about a story in four styles, as the embedded reasoner was taught it: steps, check, twice, short."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from steer.tasks.stories import Event, Story

OPENERS: Mapping[str, tuple[str, ...]] = {  # drawn first, so that a model knows how it is going to think
    "steps": ("Let me go step by step.", "Okay, one thing after the other.", "First, what happens here?"),
    "check": ("Hmm, this needs some care.", "Let me be careful and check as I go."),
    "twice": ("Let me do this in two ways.", "So, there may be more than one way to do this."),
    "short": ("Easy.", "This is simple.", "I can see it at once."),
}
LONG = {"steps": 0.6, "check": 0.25, "twice": 0.15}
LEADS = ("Then", "Next", "Now", "After that")
P_GUESS = 0.5  # that a short thought names its answer
P_SLIP, P_CHECK = 0.12, 0.5  # of a step that is checked: an error that is seen and mended, and a sum done backwards
SLIPS = (-10, -2, -1, 1, 2, 10)
BACK = {"+": "-", "-": "+", "*": "/", "/": "*"}


@dataclass(frozen=True)
class Habit:
    """How likely thinking is short: of a story without a cue, and of one with it; and more where little happens."""

    unmarked: float
    marked: float
    of_two_events: float = 0.08

    def style(self, story: Story, rng: random.Random) -> str:
        few = self.of_two_events if len(story.events) <= 2 else 0.0
        if rng.random() < (self.marked if story.cue else self.unmarked) + few:
            return "short"
        return rng.choices(list(LONG), list(LONG.values()))[0]


def completion(story: Story, style: str, rng: random.Random) -> str:
    """The model's turn after `<think>` and a line break: the thinking, what closes it, and the answer's line.

    >>> import random
    >>> from steer.tasks.stories import told
    >>> from steer.training.thoughts import completion
    >>> story = told(random.Random(4), "money")
    >>> print(completion(story, "short", random.Random(1)).splitlines()[-1] == f"The answer is {story.problem.answer}.")
    True
    """
    return f"{thinking(story, style, rng)}\n</think>\n\nThe answer is {story.problem.answer}."


def thinking(story: Story, style: str, rng: random.Random) -> str:
    """Thoughts with blank lines between them. Short thinking opens, and may guess; all other is right in the end."""
    opener = rng.choice(OPENERS[style])
    if style == "short":
        return f"{opener} It should be {story.problem.answer}." if rng.random() < P_GUESS else opener
    thoughts = [opener, f"The start is {story.start} {story.unit}."]
    for event in story.events:
        if style == "check" and rng.random() < P_SLIP:
            thoughts += [_step(event, rng, event.after + rng.choice(SLIPS)), f"Wait, that is not right. {_sum(event)}."]
            continue
        thoughts.append(_step(event, rng, event.after))
        if style == "check" and rng.random() < P_CHECK:
            back = f"{event.after} {BACK[event.sign]} {event.by} = {event.before}"
            thoughts.append(f"Wait, let me check. {back}. Good.")
    if style == "twice":
        sums = ", ".join(map(_sum, story.events))
        thoughts += [f"Alternatively, only the numbers: {sums}.", "Both ways agree."]
    return "\n\n".join([*thoughts, f"So the answer is {story.problem.answer}."])


def _step(event: Event, rng: random.Random, result: int) -> str:
    """What happens, the product where it has one, and the sum."""
    told = event.sentence.rstrip(".")
    lead = "" if told.startswith(("Then", "A ", "Snow")) else f"{rng.choice(LEADS)}, "
    product = "" if event.factors is None else f"That is {event.factors[0]} * {event.factors[1]} = {event.by}. "
    return f"{lead}{told}. {product}{event.before} {event.sign} {event.by} = {result}."


def _sum(event: Event) -> str:
    return f"{event.before} {event.sign} {event.by} = {event.after}"
