"""Is an answer right? A truncated completion is not, whatever it says."""

from probes.completions import Completion
from steer.tasks import Grader, Problem


def is_correct(completion: Completion, problem: Problem, grader: Grader) -> bool:
    """`exact`: equal but for white space. `math`: equal as mathematics, by math-verify (extra `[math]`)."""
    if completion.truncated:
        return False
    if grader == "exact":
        return completion.answer.split() == problem.answer.split()
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("Mathematical answers are graded by math-verify: pip install 'thinksteer[math]'.") from error
    # Without time-outs, as these work on the main thread only.
    gold = parse(f"${problem.answer}$", parsing_timeout=None)
    return bool(verify(gold, parse(completion.answer, parsing_timeout=None), timeout_seconds=None))
