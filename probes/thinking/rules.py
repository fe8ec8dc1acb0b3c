"""By which words a chain of thought is cut into thoughts, and each is labelled."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Label = Literal["execution", "reflection", "transition", "backtracking", "answer"]
LABELS: tuple[Label, ...] = get_args(Label)
_TRIED: tuple[Label, ...] = ("answer", "backtracking", "transition", "reflection")  # else execution
_Words = Mapping[Label, tuple[str, ...]]


@dataclass(frozen=True)
class Rules:
    """What cuts a chain of thought, and what labels a piece of it.

    A thought ends with a text of `after`, and begins with a word of `before`, as written; blank space that leads
    such a word must stand before it, and stays with the thought before. A thought is the first of answer,
    backtracking, transition and reflection whose words in `opens` it begins with, or whose words in `holds` it has
    anywhere, in small or capital letters; else execution. `tried` is that order. Raises ValueError for a label that
    words do not give, or that is not tried.

    >>> from probes import generate, load
    >>> from probes.thinking import Rules, segments
    >>> rules = Rules("steps", after=("=7",), holds={"reflection": ("=9",)})
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> [(s.start, s.stop, s.label) for s in segments(model, completion, rules)]
    [(9, 15, 'execution'), (15, 18, 'reflection')]
    """

    name: str
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    opens: _Words = field(default_factory=dict)
    holds: _Words = field(default_factory=dict)
    tried: tuple[Label, ...] = _TRIED

    def __post_init__(self) -> None:
        if unknown := [label for label in (*self.opens, *self.holds, *self.tried) if label not in _TRIED]:
            raise ValueError(f"{unknown[0]!r} is no label that words give. Known: {', '.join(_TRIED)}.")
        if untried := [label for label in (*self.opens, *self.holds) if label not in self.tried]:
            raise ValueError(
                f"The rules {self.name!r} give words for {untried[0]}, but never try it: name it in tried."
            )


RULES: Mapping[str, Rules] = {
    rules.name: rules
    for rules in (
        Rules(
            "seal",
            after=("\n\n",),
            opens={"reflection": ("wait",), "transition": ("alternatively",)},
            holds={
                "transition": (
                    "think differently",
                    *(f"another {x}" for x in ("way", "approach", "method", "solution", "strategy", "technique")),
                ),
                "reflection": (
                    *("verify", "make sure", "hold on", "think again"),
                    *("'s correct", "'s incorrect", "let me check", "seems right"),
                ),
            },
            tried=("reflection", "transition"),
        ),
        Rules(
            "trimr",
            before=("\n\nWait", "\n\nBut", "\n\nAlternatively"),
            opens={"transition": ("alternatively",), "reflection": ("wait", "but")},
            holds={"answer": ("\\boxed", "final answer", "the answer is")},
        ),
        Rules(
            "organism",
            after=tuple(f"={k}" for k in range(10)),
            before=("Wait", "Hmm"),
            opens={"reflection": ("wait", "hmm")},
        ),
    )
}
"""Published lists, as far as they are known; none is verified, so no fidelity to a paper is claimed.

*seal* (Chen et al. 2025): the words of a replication; their order, and that `Wait` and `Alternatively` count only where
a thought begins with them, as three public forks of the authors' code have it. *trimr* (Lin et al. 2025): cut at the
three words that summaries of it name, of a longer list that is not public. It tells answer-bearing thoughts with a
verifier model, in whose place stand words of ours; its labels are ours too. *organism*: the embedded model's own words,
where a result ends a step. No list gives backtracking: in Venhoff et al. (2025) a language model labels it. For that,
write `Rules` of your own.
"""
