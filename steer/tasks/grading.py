"""Is an answer right? A truncated completion is not, whatever it says."""

from dataclasses import dataclass

from probes.generation.completions import Completion
from probes.words import checked
from steer.tasks.answers import UNITS, is_mathematics, last_boxed, letter_of, number_of, plain_text, quantity_of, stated
from steer.tasks.gym import scores_fully
from steer.tasks.mathematics import equal_as_mathematics
from steer.tasks.task import Grader, Problem


@dataclass(frozen=True)
class Grade:
    """Whether an answer is right, and whether grading it had to be stopped, for then it counts as wrong."""

    correct: bool
    stopped: bool = False


@checked
def is_correct(completion: Completion, problem: Problem, grader: Grader) -> bool:
    """Is the completion's answer that of the problem, by a grader's rule? A truncated one is wrong, whatever it says.

    `exact`: equal but for white space. `text`: what it states, or its last line, is the same text, whatever its case,
    its minus signs or its quotes. `number`: the number it comes to is equal. `choice`: the letter is. `math`: what it
    states is equal as mathematics, by math-verify (extra `[math]`) in a process that is stopped after 1.5 s or 2 GB,
    and then wrong. `gym`: the full score by the rule of the problem's dataset (extra `[tasks]`). A problem's own grader
    goes before the task's. But for `exact` and `gym`, equal text is always right. Raises ImportError where the extra
    is not installed.

    >>> from probes import generate, load
    >>> from steer.tasks import Problem, is_correct
    >>> completion = generate(load("organism"), ["a 3 b +4 c *7"])[0]
    >>> completion.answer, is_correct(completion, Problem("0", "a 3 b +4 c *7", "9"), "exact")
    ('9', True)
    """
    return grade(completion, problem, grader).correct


def grade(completion: Completion, problem: Problem, grader: Grader) -> Grade:
    """As `is_correct`, and whether grading had to be stopped."""
    if completion.truncated:
        return Grade(False)
    answer, gold = completion.answer, problem.answer
    match problem.grader or grader:
        case "exact":
            return Grade(answer.split() == gold.split())
        case "gym":
            return Grade(scores_fully(answer, problem))
        case "text":
            return Grade(_same_text(gold, answer))
        case "number":
            number = number_of(answer)
            return Grade(_same_text(gold, answer) or (number is not None and number == number_of(gold)))
        case "choice":
            wanted = letter_of(gold) or gold
            return Grade(letter_of(answer) == wanted or _same_text(gold, answer))
        case "math":
            return _grade_mathematics(gold, answer)


@checked
def answer_key(completion: Completion, grader: Grader) -> str | None:
    """What a completion answers, as a text that is the same for two that a vote takes for one answer.

    The number it comes to for `number`, the letter for `choice`, else what it states, or its last line, as plain text:
    two formulas that are written otherwise are two answers. None for a truncated completion, and for one that says
    nothing.

    >>> from probes import generate, load
    >>> from steer.tasks import answer_key
    >>> answer_key(generate(load("organism"), ["a 3 b +4 c *7"])[0], "number")
    '9'
    """
    if completion.truncated:
        return None
    answer = completion.answer
    if grader == "number" and (number := number_of(answer)) is not None:
        return str(number)
    if grader == "choice" and (letter := letter_of(answer)) is not None:
        return letter
    lines = answer.strip().splitlines()
    return plain_text(stated(answer) or (lines[-1] if lines else "")) or None


def grader_for(answer: str) -> Grader:
    """The rule for an answer whose task names none: a capital letter is a choice, a formula mathematics, else text."""
    if len(answer.strip("() .")) == 1 and "A" <= answer.strip("() .") <= "Z":
        return "choice"
    return "math" if is_mathematics(answer) else "text"


def _same_text(gold: str, answer: str) -> bool:
    piece = stated(answer)
    if piece is None:
        lines = answer.strip().splitlines()
        said = {answer, *lines[-1:]}
    else:
        said = {piece}
    return plain_text(gold) in {plain_text(text) for text in said}


def _same_quantity(gold: str, answer: str) -> bool | None:
    """The same number, in the same unit or in none; None where it is no quantity, or the words are no known units."""
    wanted, said = quantity_of(gold), quantity_of(stated(answer) or answer)
    if wanted is None or said is None:
        return None
    if said[1] == wanted[1] or not said[1] or not wanted[1]:
        return True if wanted[0] == said[0] else None
    return False if {said[1], wanted[1]} <= set(UNITS.values()) else None


def _grade_mathematics(gold: str, answer: str) -> Grade:
    same = _same_text(gold, answer) or _same_quantity(gold, answer)
    if same is not None:
        return Grade(same)
    box, piece = last_boxed(answer), stated(answer) or answer
    tex = "\\" in piece and "$" not in piece
    statement = f"\\boxed{{{box}}}" if box is not None else f"${piece}$" if tex else piece
    equal = equal_as_mathematics(f"${gold}$", statement)
    return Grade(bool(equal), stopped=equal is None)
