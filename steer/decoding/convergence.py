"""Stop thinking once it keeps coming to one answer: the control, and the verifiers that read answers off thoughts."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from probes.model.loading import delimiters_of, markers_of, tokenizer_of
from probes.model.tokens import decode, encode_prompt, words_ids
from steer.decoding.control import Processors
from steer.decoding.state import DecodingState, Ids, Scores

Verifier = Callable[[list[str]], str | None]  # the answer that the last of some thoughts comes to, or None
RESULT = r"(?:=|####|\\boxed\{|\bis:?)\s*\$?(-?\d(?:[\d,]*\d)?(?:[./]\d+)?)"


@dataclass(frozen=True)
class StatedAnswer:
    """The last match of `pattern` in the last thought, its first group: `= 7`, `is 7`, `#### 7` or `\\boxed{7}`.

    >>> from steer.decoding import StatedAnswer
    >>> StatedAnswer()(["3 + 4 = 8.", "Wait, 3 + 4 = 7, so the answer is 7."])
    '7'
    """

    pattern: str = RESULT

    def __call__(self, thoughts: list[str]) -> str | None:
        answers = re.findall(self.pattern, thoughts[-1])
        return answers[-1] if answers else None


@dataclass(frozen=True)
class Converge:
    """Stop the thinking after `m` equal intermediate answers in a row (TrimR, Lin et al. 2025: three).

    The thinking is cut into thoughts at reflection `markers` (the model's own list, if None); `verifier` gives the
    answer that the last of the thoughts so far comes to, and a thought without one is passed over. A thought is whole
    when the marker of the next one stands. Each `every` tokens the new whole thoughts are read: only then does the host
    see tokens. At the m-th equal answer `guide` and the closing delimiter are written. Of TrimR this is the rule
    against overthinking; its limits on undecided and on repeated thinking, and its few-shot prompts, are not here.

    The name of a control holds its verifier: give a frozen dataclass such as `StatedAnswer`, or a named function.
    Raises ValueError where a number is below 1 and, at the start of a run, where the vocabulary cannot write the guide.

    >>> from probes import generate, load
    >>> from steer.decoding import BudgetForcing, Controlled, Converge, Together
    >>> model, control = load("organism"), Together((BudgetForcing(9), Converge(2, every=1)))
    >>> completion = generate(model, ["a 3 b +4 c *7"], decoding=Controlled(model, control))[0]
    >>> completion.thinking, completion.answer
    ('Okay a =3 b +4 =7 c *7 =9 Wait c *7 =9 Wait d', '9')
    """

    m: int = 3
    verifier: Verifier = field(default_factory=StatedAnswer)
    markers: tuple[str, ...] | None = None
    guide: str = ""
    every: int = 50

    def __post_init__(self) -> None:
        if self.m < 1 or self.every < 1:
            raise ValueError(
                f"Answers are counted from 1 on, every token or more, but got m={self.m}, every={self.every}."
            )

    def __str__(self) -> str:
        verifier = getattr(self.verifier, "__qualname__", None) or repr(self.verifier)
        fields = (
            f"m={self.m}",
            f"verifier={verifier}",
            f"markers={self.markers}",
            f"guide={self.guide!r}",
            f"every={self.every}",
        )
        return f"Converge({', '.join(fields)})"

    def processors(self, model: PreTrainedModel, rows: DecodingState) -> Processors:
        """The processors of one run."""
        guide = words_ids(tokenizer_of(model), self.guide, "guide") if self.guide else ()
        return Processors(after=(_Stop(self, model, rows, guide),), turns=True)


class _Stop(LogitsProcessor):
    """`stopping`: rows that have converged; `cursor`: the next token of their guide; `began`: rows whose prompt opens
    their thinking."""

    counts: list["_Count"]
    began: list[bool]
    stopping: Tensor
    cursor: Tensor

    def __init__(self, control: Converge, model: PreTrainedModel, rows: DecodingState, guide: tuple[int, ...]) -> None:
        self.control, self.model, self.rows = control, model, rows
        self.markers = markers_of(model) if control.markers is None else control.markers
        self.guide = torch.tensor(guide, device=rows.device, dtype=torch.long)
        rows.keep(self, "counts", lambda: [_Count(control) for _ in range(rows.batch)])
        rows.keep(self, "began", lambda: [False] * rows.batch)
        rows.keep(self, "stopping", rows.no)
        rows.keep(self, "cursor", rows.zeros)

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        rows = self.rows
        if not any(rows.steps):
            self.began = rows.opened.tolist()
        elif due := [row for row, step in enumerate(rows.steps) if step % self.control.every == 0]:
            self._read(input_ids, due)
        where = rows.thinking & rows.free & self.stopping
        left = self.cursor < len(self.guide)
        if len(self.guide):
            rows.note("guide", where & (self.cursor == 0))
            scores = rows.force(scores, where & left, self.guide[self.cursor.clamp(max=len(self.guide) - 1)])
            self.cursor = self.cursor + (where & left)
        return rows.end_thinking(scores, where & ~left)

    def _read(self, ids: Ids, due: list[int]) -> None:
        thinks = (self.rows.thinking & ~self.stopping).tolist()
        for row in due:
            if thinks[row]:
                written = ids[row, -self.rows.steps[row] :].tolist()
                if self.counts[row].converged(self._thoughts(written, row)):
                    self.stopping[row] = True

    def _thoughts(self, ids: list[int], row: int) -> list[str]:
        opened = None if self.began[row] else delimiters_of(self.model).opening(ids)
        begin = 0 if opened is None else opened.end
        return thoughts_of(decode(tokenizer_of(self.model), ids[begin:]), self.markers)


class _Count:
    """How many times in a row one answer came, over the thoughts read so far."""

    def __init__(self, control: Converge) -> None:
        self.control = control
        self.read, self.equal, self.answer = 0, 0, ""

    def converged(self, thoughts: list[str]) -> bool:
        """Of thoughts the last of which is not whole."""
        for end in range(self.read + 1, len(thoughts)):
            answer = self.control.verifier(thoughts[:end])
            if answer is not None:
                self.equal = self.equal + 1 if self.equal and answer == self.answer else 1
                self.answer = answer
            if self.equal >= self.control.m:
                return True
        self.read = max(self.read, len(thoughts) - 1)
        return False


def thoughts_of(thinking: str, markers: Sequence[str]) -> list[str]:
    """The thinking cut before each marker; a word counts whole, and only once something follows it."""
    ways = "|".join(rf"\b{re.escape(m)}\b" if m[:1].isalnum() and m[-1:].isalnum() else re.escape(m) for m in markers)
    return [part for part in re.split(rf"(?=(?:{ways})[\s\S])", thinking) if part.strip()] if markers else [thinking]


@dataclass(frozen=True, eq=False)
class YesNo:
    """A verifier by the probability of yes against no, in one forward pass of a judge (TrimR's way).

    A thought that states an answer by the judge is that answer; it is equal to the one stated before it where the judge
    says so, and then named by the first of them. The judge is a model object of its own, not the one being steered,
    whose clocks it would disturb. TrimR's own prompts are not published; these are ours. Raises ValueError where the
    judge's vocabulary has no token for yes or no.

    >>> from probes import load
    >>> from probes.model import tokenizer_of
    >>> from steer.decoding import YesNo
    >>> judge = load("organism")  # it knows neither word, so both are added, untrained
    >>> tokenizer_of(judge).add_tokens(["yes", "no"]), judge.resize_token_embeddings(71).num_embeddings
    (2, 71)
    >>> 0 < YesNo(judge, "organism").probability("Is 7 odd?") < 1
    True
    """

    judge: PreTrainedModel = field(repr=False)
    name: str
    threshold: float = 0.5
    states: str = "Does this text state a final answer? Reply yes or no.\n\n{thought}"
    agrees: str = "Do these two texts state the same answer? Reply yes or no.\n\n1. {first}\n\n2. {second}"
    _known: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, thoughts: list[str]) -> str | None:
        answer: str | None = None
        before: str | None = None
        for thought in thoughts:
            stated = self._holds(self.states.format(thought=thought))
            if stated:
                same = before is not None and self._holds(self.agrees.format(first=before, second=thought))
                answer, before = (answer if same else thought), thought
        return answer if stated else None

    def _holds(self, question: str) -> bool:
        if question not in self._known:
            self._known[question] = self.probability(question)
        return self._known[question] >= self.threshold

    @torch.no_grad()
    def probability(self, question: str) -> float:
        """P(yes) / (P(yes) + P(no)) of the next token, each over the ways to write it as one token."""
        tokenizer = tokenizer_of(self.judge)
        yes, no = (_single_tokens(self.judge, word) for word in ("yes", "no"))
        ids = torch.tensor([encode_prompt(tokenizer, question)], device=self.judge.device)
        logits = self.judge(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()
        for_yes, for_no = (logits[list(ways)].logsumexp(0) for ways in (yes, no))
        return float(torch.sigmoid(for_yes - for_no))


def _single_tokens(model: PreTrainedModel, word: str) -> set[int]:
    tokenizer = tokenizer_of(model)
    ways = [
        (way, tokenizer.encode(way, add_special_tokens=False))
        for w in (word, word.capitalize())
        for way in (w, " " + w)
    ]
    tokens = {ids[0] for way, ids in ways if len(ids) == 1 and decode(tokenizer, ids).strip() == way.strip()}
    if not tokens:
        raise ValueError(f"The vocabulary of {tokenizer.name_or_path!r} has no token for {word!r}: name another judge.")
    return tokens
