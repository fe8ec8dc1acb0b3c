"""The process that asks math-verify whether two answers are equal: a line of JSON in, a line of JSON out.

Run as a file, so that it imports nothing of ours; what is asked of it may be a tower of powers that no memory holds.
"""

import json
import logging
import os
import sys
from contextlib import suppress

try:
    import resource
except ImportError:  # Windows: the time limit is left
    resource = None  # type: ignore[assignment]

MEMORY = 2 << 30


def main() -> None:
    """Answer questions until the pipe closes. Ends itself where memory ran out, or the stack: a new one is clean."""
    if resource is not None:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        gold, said = json.loads(line)
        stopped = None
        try:
            # Without time-outs of its own, which work by signals: whoever asks counts the time.
            wanted, given = parse(gold, parsing_timeout=None), parse(said, parsing_timeout=None)
            right = bool(verify(wanted, given, timeout_seconds=None))
        except (MemoryError, RecursionError) as error:
            right, stopped = False, type(error).__name__
        except Exception:  # what sympy raises over what is no mathematics has no end
            right = False
        print(json.dumps([right, stopped]), file=answers, flush=True)
        if stopped:
            return


if __name__ == "__main__":
    main()
