"""Decoding controls and prompt styles by the names that a command line has for them."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from steer.decoding.budgets import Budget, BudgetForcing, CloseBias
from steer.decoding.control import DecodingControl
from steer.decoding.convergence import Converge
from steer.decoding.early_exit import EntropyExit
from steer.decoding.prompts import PromptStyle, ellipsis, empty_thinking, length_tag, step_by_step, thinking_off

T = TypeVar("T")


def control_named(name: str) -> DecodingControl:
    """`budget:100`, `budget:100/20`, `wait:2`, `close:-3`, `converge:3` or `entropy:0.1`. Raises ValueError otherwise.

    >>> from steer.decoding import control_named
    >>> control_named("budget:100/20")
    Budget(thinking=100, solution=20)
    """
    kind, _, rest = name.partition(":")
    known: dict[str, Callable[[], DecodingControl]] = {
        "budget": lambda: Budget(*(int(tokens) if tokens else None for tokens in rest.split("/"))),
        "wait": lambda: BudgetForcing(int(rest)),
        "close": lambda: CloseBias(float(rest)),
        "converge": lambda: Converge(int(rest)),
        "entropy": lambda: EntropyExit(float(rest)),
    }
    ways = "budget:THINKING[/SOLUTION], wait:N, close:BIAS, converge:M, entropy:BELOW"
    return _made(known, kind, name, f"a decoding control: {ways}")


def prompt_named(name: str) -> PromptStyle:
    """`step-by-step`, `ellipsis`, `empty-thinking`, `thinking-off` or `length:100`. Raises ValueError otherwise.

    >>> from steer.decoding import prompt_named
    >>> prompt_named("length:100").question("What is 3 + 4?")
    'What is 3 + 4? Think for 100 tokens.'
    """
    kind, _, rest = name.partition(":")
    known: dict[str, Callable[[], PromptStyle]] = {
        "step-by-step": step_by_step,
        "ellipsis": ellipsis,
        "empty-thinking": empty_thinking,
        "thinking-off": thinking_off,
        "length": lambda: length_tag(int(rest)),
    }
    return _made(known, kind, name, f"a prompt: {', '.join(known)}:TOKENS")


def _made(known: Mapping[str, Callable[[], T]], kind: str, name: str, what: str) -> T:
    try:
        return known[kind]()
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name!r} is not {what}.") from error
    except ValueError as error:
        raise ValueError(f"{name!r} is not {what}. {error}") from error
