"""Is an answer right? A truncated completion is not, whatever it says."""

from probes.generation.completions import Completion
from steer.tasks.answers import last_boxed, letter_of, number_of, stated
from steer.tasks.gym import scores_fully
from steer.tasks.task import Grader, Problem


def is_correct(completion: Completion, problem: Problem, grader: Grader) -> bool:
    """Is the completion's answer that of the problem, by a grader's rule? A truncated one is wrong, whatever it says.

    `exact`: equal but for white space. `number`: the number it comes to is equal. `choice`: the letter is.
    `math`: what it states is equal as mathematics, by math-verify (extra `[math]`). `gym`: the full score by the rule
    of the problem's dataset (extra `[tasks]`). Raises ImportError where the extra is not installed.

    >>> from probes import generate, load
    >>> from steer.tasks import Problem, is_correct
    >>> completion = generate(load("organism"), ["a 3 b +4 c *7"])[0]
    >>> completion.answer, is_correct(completion, Problem("0", "a 3 b +4 c *7", "9"), "exact")
    ('9', True)
    """
    if completion.truncated:
        return False
    answer = completion.answer
    match grader:
        case "exact":
            return answer.split() == problem.answer.split()
        case "number":
            number = number_of(answer)
            return number is not None and number == number_of(problem.answer)
        case "choice":
            return letter_of(answer) == problem.answer
        case "gym":
            return scores_fully(answer, problem)
        case "math":
            return _equal_as_mathematics(problem.answer, answer)


def _equal_as_mathematics(gold: str, answer: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("Mathematical answers are graded by math-verify: pip install 'thinksteer[math]'.") from error
    box, piece = last_boxed(answer), stated(answer) or answer
    tex = "\\" in piece and "$" not in piece
    statement = f"\\boxed{{{box}}}" if box is not None else f"${piece}$" if tex else piece
    # Without time-outs, as these work on the main thread only.
    wanted, given = parse(f"${gold}$", parsing_timeout=None), parse(statement, parsing_timeout=None)
    return bool(verify(wanted, given, timeout_seconds=None))
