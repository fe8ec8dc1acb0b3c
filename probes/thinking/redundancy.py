"""What a chain of thought is made of: how soon it has solved its problem, what it goes on with, which steps fail."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probes.generation.completions import Completion
from probes.model.loading import tokenizer_of
from probes.model.tokens import REFLECTION_MARKERS
from probes.thinking._segments import Segment

Verifier = Callable[[list[str]], str | None]  # the answer that the last of some thoughts comes to, or None
Holds = Callable[[list[str]], bool | None]  # is the last of some thoughts true? None where it states nothing to check

_NUMBER = r"(-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)"
_EQUATION = re.compile(
    rf"(?<![\w.,]){_NUMBER}\s*([-+*/×÷])\s*{_NUMBER}\s*=\s*{_NUMBER}(?![\w^]|[.,]\d|\s*[-+*/×÷]\s*[\d(])"
)
# What stands before a part of a longer expression, on its line; and before a minus that is no sign.
_GOES_ON = re.compile(r"(?:[\w)\]}][^\S\n]*[-+*/×÷·^]|\\(?:times|cdot|div)|\d[^\S\n]*x)[^\S\n]*$")
_OPERAND = re.compile(r"[\d)\]}][^\S\n]*$")


@dataclass(frozen=True)
class Redundancy:
    """A chain against the answer of its problem *(after Hong et al. 2025, internal and external redundancy)*.

    `solution` is the thought, by its number, that first comes to the right answer, and `solved` how many tokens of the
    thinking stand up to its end; None where none does. `failed` is the share of failed thoughts, of those that state
    something to check; NaN where none does.

    >>> from probes.thinking import Redundancy
    >>> chain = Redundancy(tokens=50, thoughts=5, solution=2, solved=30, failed=0.0)
    >>> chain.external
    0.4
    """

    tokens: int
    thoughts: int
    solution: int | None
    solved: int | None
    failed: float

    @property
    def external(self) -> float:
        """The share of the thinking after the first correct solution; NaN where there is none."""
        return math.nan if self.solved is None else 1 - self.solved / self.tokens


def chain_redundancy(
    source: PreTrainedModel | PreTrainedTokenizerBase,
    completion: Completion,
    found: Sequence[Segment],
    *,
    states: Verifier,
    is_right: Callable[[str], bool],
    holds: Holds | None = None,
) -> Redundancy:
    """A completion, cut into thoughts by `probes.thinking.segments`.

    `states` reads the answer that the last of the thoughts so far comes to, such as `steer.decoding.StatedAnswer()`,
    and `is_right` tells whether that is the problem's; an intermediate result that happens to equal it counts. `holds`
    checks a thought, such as `equations_hold`.

    >>> from probes import generate, load
    >>> from probes.thinking import chain_redundancy, segments
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> thoughts = segments(model, completion, "organism")
    >>> chain = chain_redundancy(model, completion, thoughts, states=lambda t: t[-1][-1], is_right="7".__eq__)
    >>> chain.thoughts, chain.solution, round(chain.external, 2)
    (3, 1, 0.33)
    """
    texts = thought_texts(source, completion, found)
    tokens = found[-1].stop - found[0].start if found else 0
    solution = next((n for n in range(len(texts)) if _right(states(texts[: n + 1]), is_right)), None)
    checked = [] if holds is None else [v for n in range(len(texts)) if (v := holds(texts[: n + 1])) is not None]
    return Redundancy(
        tokens,
        len(texts),
        solution,
        None if solution is None else found[solution].stop - found[0].start,
        checked.count(False) / len(checked) if checked else math.nan,
    )


def thought_texts(
    source: PreTrainedModel | PreTrainedTokenizerBase, completion: Completion, found: Sequence[Segment]
) -> list[str]:
    """The text of each thought, without the blank space around it.

    >>> from probes import generate, load
    >>> from probes.thinking import segments, thought_texts
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> thought_texts(model, completion, segments(model, completion, "organism"))
    ['Okay a =3', 'b +4 =7', 'c *7 =9']
    """
    tokenizer = tokenizer_of(source) if isinstance(source, PreTrainedModel) else source
    return [str(tokenizer.decode(list(completion.all_ids[s.start : s.stop]))).strip() for s in found]


def equations_hold(thoughts: Sequence[str]) -> bool | None:
    """Are all equations of the last thought true, such as `12 + 30 = 42`? None where it has none.

    Two numbers, one of + - * / × ÷, and what comes out, of a division also rounded or cut off. Parts of a longer
    expression, such as of `1 + 2 + 3 = 6`, are not checked.

    >>> from probes.thinking import equations_hold
    >>> equations_hold(["3 * 4 = 12. 30 + 12 = 43."]), equations_hold(["30 + 12 = 42"]), equations_hold(["Hmm."])
    (False, True, None)
    """
    text = thoughts[-1].replace("−", "-")
    checked = [_holds(*match.groups()) for match in _EQUATION.finditer(text) if _is_whole(text[: match.start()], match)]
    return all(checked) if checked else None


def marker_rates(completions: Sequence[Completion], markers: Sequence[str] = REFLECTION_MARKERS) -> dict[str, float]:
    """How often each marker stands in 1,000 tokens of thinking, over all completions, as a whole word in small or
    capital letters *(after Liu et al. 2025, From Thinking to Output, whose list is not published)*.

    >>> from probes import generate, load
    >>> from probes.thinking import marker_rates
    >>> completions = generate(load("organism"), ["a 3 b +4 c *7"])
    >>> {marker: round(rate) for marker, rate in marker_rates(completions, ["Okay", "wait"]).items()}
    {'Okay': 91, 'wait': 0}
    """
    tokens = sum(c.thinking_tokens for c in completions)
    text = "\n".join(c.thinking or "" for c in completions)
    counts = {marker: len(re.findall(rf"(?<!\w){re.escape(marker)}(?!\w)", text, re.IGNORECASE)) for marker in markers}
    return {marker: 1000 * count / tokens if tokens else math.nan for marker, count in counts.items()}


def _right(answer: str | None, is_right: Callable[[str], bool]) -> bool:
    return answer is not None and is_right(answer)


def _is_whole(before: str, match: re.Match[str]) -> bool:
    """Is the equation no part of a longer expression that began before it?"""
    return _GOES_ON.search(before) is None and not (match[1].startswith("-") and _OPERAND.search(before))


def _holds(left: str, sign: str, right: str, result: str) -> bool:
    a, b, c = (float(number.replace(",", "")) for number in (left, right, result))
    match sign:
        case "+":
            value = a + b
        case "-":
            value = a - b
        case "*" | "×":
            value = a * b
        case _:
            value, decimals = a / b if b else math.nan, len(result.partition(".")[2])
            if b and decimals and c in (round(value, decimals), math.trunc(value * 10**decimals) / 10**decimals):
                return True
    return math.isclose(value, c, rel_tol=1e-6, abs_tol=1e-9)
