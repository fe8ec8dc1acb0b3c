"""A chain of thought cut into thoughts: from token ids, with exact positions, each thought with its label."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probes.generation.completions import Completion
from probes.model.loading import tokenizer_of
from probes.model.tokens import pieces, present_markers
from probes.tables import Table
from probes.thinking.rules import LABELS, RULES, Label, Rules
from probes.thinking.spans import Span, position_named
from probes.words import checked


@checked
@dataclass(frozen=True)
class Segment:
    """One thought: the positions [start, stop) of prompt + completion, and what kind of thought it is.

    Raises ValueError where it is empty.

    >>> from probes.thinking import Segment
    >>> Segment(start=7, stop=10, label="execution")
    Segment(start=7, stop=10, label='execution')
    """

    start: int
    stop: int
    label: Label

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"A segment needs 0 <= start < stop, but got start={self.start} and stop={self.stop}.")


def segments(
    source: PreTrainedModel | PreTrainedTokenizerBase, completion: Completion, rules: str | Rules = "seal"
) -> tuple[Segment, ...]:
    r"""The thinking of a completion, cut by `rules` (a name in `RULES`, or your own): no gap, no overlap.

    From the first generated token after the opening delimiter up to the closing one, or the end where the thinking was
    cut off. Empty where nothing was thought. Only whole tokens are parted: one that ends a step, such as `.\n\n`, is
    the last of that step. Words that the vocabulary lacks cut and label nothing (`present_rules` names them). `source`
    is the model, or its tokenizer if that tells the delimiters. Raises ValueError for an unknown name, and where the
    vocabulary has nothing that cuts.

    >>> from probes import generate, load
    >>> from probes.thinking import segments
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> segments(model, completion, "organism")[0]
    Segment(start=9, stop=12, label='execution')
    """
    tokenizer = tokenizer_of(source) if isinstance(source, PreTrainedModel) else source
    known, _ = present_rules(tokenizer, rules)
    span = completion.span
    if span is None or span.text_start >= span.text_end:
        return ()
    first, stop = span.text_start, span.text_end
    pieces = _pieces(tokenizer, len(tokenizer))
    texts = [pieces[i] if i < len(pieces) else "" for i in completion.all_ids[first:stop]]
    edges = [0, *_cuts(texts, known), len(texts)]
    parts = zip(edges, edges[1:], strict=False)
    return tuple(Segment(first + a, first + b, _label("".join(texts[a:b]), known)) for a, b in parts)


def present_rules(tokenizer: PreTrainedTokenizerBase, rules: str | Rules) -> tuple[Rules, tuple[str, ...]]:
    """The rules without the words that this vocabulary lacks, and those words.

    Raises ValueError for an unknown name, and where nothing that cuts is left.

    >>> from probes.model import load, tokenizer_of
    >>> from probes.thinking import present_rules
    >>> rules, lacking = present_rules(tokenizer_of(load("organism")), "organism")
    >>> rules.before, lacking
    (('Wait', 'Hmm'), ())
    """
    if isinstance(rules, str) and rules not in RULES:
        raise ValueError(f"{rules!r} names no rules. Known: {', '.join(RULES)}. Or write your own: Rules(...).")
    whole = RULES[rules] if isinstance(rules, str) else rules
    lacking: list[str] = []

    def kept(words: tuple[str, ...], *, as_written: bool) -> tuple[str, ...]:
        ways = {word: {word} if as_written else {word, word.capitalize(), word.upper()} for word in words}
        absent = [word for word in words if not present_markers(tokenizer, sorted(ways[word]))[0]]
        lacking.extend(word for word in absent if word not in lacking)
        return tuple(word for word in words if word not in absent)

    after, before = kept(whole.after, as_written=True), kept(whole.before, as_written=True)
    opens, holds = ({k: kept(v, as_written=False) for k, v in each.items()} for each in (whole.opens, whole.holds))
    if not after and not before:
        raise ValueError(
            f"The rules {whole.name!r} cut at {', '.join(map(repr, (*whole.after, *whole.before))) or 'nothing'}, and "
            f"the vocabulary of {tokenizer.name_or_path!r} has none of these. Known rules: {', '.join(RULES)}; or "
            "write your own: Rules(...)."
        )
    return replace(whole, after=after, before=before, opens=opens, holds=holds), tuple(lacking)


def step_ids(tokenizer: PreTrainedTokenizerBase, delimiter: str = "\n\n") -> tuple[int, ...]:
    """All ids whose text holds `delimiter`, such as `.\\n\\n`: the tokens that end a step.

    Where the tokenizer writes it between two sentences as several tokens, as GPT-2's writes a blank line, the last of
    these too, wherever it stands. Raises ValueError where no token holds it.
    """
    pieces = _pieces(tokenizer, len(tokenizer))
    found = tuple(i for i, text in enumerate(pieces) if delimiter in text)
    between = tokenizer.encode(f"a.{delimiter}A", add_special_tokens=False) if delimiter else []
    if found and not set(found) & set(between):
        ends = [i for i in between if pieces[i] and delimiter.endswith(pieces[i])]
        found = tuple(sorted({*found, *ends[-1:]}))
    if not delimiter or not found:
        raise ValueError(
            f"No token of {tokenizer.name_or_path!r} holds {delimiter!r}, so steps cannot be told by it. Name another "
            "delimiter."
        )
    return found


def segment_spans(
    completion: Completion,
    found: Sequence[Segment],
    label: str,
    *,
    position: str = "segment",
) -> list[Span]:
    """Where to read the segments of a label, for a direction.

    `segment`: the positions whose next token is in the segment, [start-1, stop-1). `before`: the last token before it
    alone, which ends the step before, as SEAL reads (Chen et al. 2025). Raises ValueError for another position.

    >>> from probes import generate, load
    >>> from probes.thinking import segment_spans, segments
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> thoughts = segments(model, completion, "organism")
    >>> [(span.start, span.stop) for span in segment_spans(completion, thoughts, "execution")]
    [(8, 11), (11, 14), (14, 17)]
    >>> [(span.start, span.stop) for span in segment_spans(completion, thoughts, "execution", position="before")]
    [(8, 9), (11, 12), (14, 15)]
    """
    if label not in LABELS:
        raise ValueError(f"{label!r} is no label. Known: {', '.join(LABELS)}.")
    read, ids, seed = position_named(position, "segment"), completion.all_ids, completion.sampling.seed
    return [read.within(ids, s.start, s.start, s.stop, seed=seed) for s in found if s.label == label]


def segment_table(
    source: PreTrainedModel | PreTrainedTokenizerBase, completion: Completion, found: Sequence[Segment]
) -> Table:
    """Segments with their text, a row each.

    >>> from probes import generate, load
    >>> from probes.thinking import segment_table, segments
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> print(segment_table(model, completion, segments(model, completion, "organism")))
           3 thoughts of completion 0
    ┏━━━━━━━━━━━┳━━━━━━━┳━━━━━━┳━━━━━━━━━━━┓
    ┃ label     ┃ start ┃ stop ┃ text      ┃
    ┡━━━━━━━━━━━╇━━━━━━━╇━━━━━━╇━━━━━━━━━━━┩
    │ execution │     9 │   12 │ Okay a =3 │
    │ execution │    12 │   15 │ b +4 =7   │
    │ execution │    15 │   18 │ c *7 =9   │
    └───────────┴───────┴──────┴───────────┘
    """
    tokenizer = tokenizer_of(source) if isinstance(source, PreTrainedModel) else source
    texts = [str(tokenizer.decode(list(completion.all_ids[s.start : s.stop]))) for s in found]
    rows = tuple((s.label, s.start, s.stop, text.strip()) for s, text in zip(found, texts, strict=True))
    return Table(("label", "start", "stop", "text"), rows, f"{len(rows)} thoughts of completion {completion.id}")


@lru_cache(maxsize=4)
def _pieces(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[str, ...]:
    """What each id adds to a text. `size` tells a vocabulary that has grown. Ids that no token has add nothing."""
    last = max(size - 1, *tokenizer.get_vocab().values())
    return tuple(pieces(tokenizer, range(last + 1)))


def _cuts(texts: Sequence[str], rules: Rules) -> list[int]:
    """The tokens that begin a thought, in order, but the first. None parts off a thought that is blank."""
    whole = "".join(texts)
    owner = [number for number, text in enumerate(texts) for _ in text]  # of each letter, its token
    cuts = {owner[m.end() - 1] + 1 for word in rules.after for m in re.finditer(_ending(word), whole)}
    for word in rules.before:
        lead = len(word) - len(word.lstrip())
        cuts |= {owner[m.start() + lead] for m in re.finditer(_whole_word(word), whole)}
    kept, start = [], 0
    for cut in sorted(cuts):
        if "".join(texts[start:cut]).strip() and "".join(texts[cut:]).strip():
            kept.append(cut)
            start = cut
    return kept


def _whole_word(word: str) -> str:
    """A pattern that does not find `But` in `Butter`."""
    left, right = (r"(?<!\w)" if word[0].isalnum() else ""), (r"(?!\w)" if word[-1].isalnum() else "")
    return left + re.escape(word) + right


def _ending(word: str) -> str:
    """A blank line of several empty lines ends with the last of them."""
    return _whole_word(word) + (r"\n*" if word.endswith("\n") else "")


def _label(text: str, rules: Rules) -> Label:
    small = text.strip().lower()
    for label in rules.tried:
        if any(re.match(_whole_word(word.lower()), small) for word in rules.opens.get(label, ())):
            return label
        if any(word.lower() in small for word in rules.holds.get(label, ())):
            return label
    return "execution"
