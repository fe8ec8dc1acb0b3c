"""Where in a chain something is read: spans of positions, and the one table of what they are called."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from probes.files import check_keys, reading
from probes.generation.completions import Completion
from probes.model.loading import tokenizer_of
from probes.tables import Brief
from probes.texts import read_json_lines
from probes.words import checked

Thing = Literal["completion", "text", "segment"]


@dataclass(frozen=True, repr=False)
class Span(Brief):
    """Token ids, and the positions [start, stop) of them that are read.

    `position` is the name of the rule that says so (see `POSITIONS`), `seed` that of the sampling which wrote the
    ids; both go into the birth of a direction, and two spans are equal without them. Raises ValueError where they
    are empty or not in the sequence.

    >>> from probes import Span
    >>> Span((1, 6, 17, 5), start=1, stop=3)
    Span(ids=(1, 6, 17, 5), start=1, stop=3, position='', seed=None)
    >>> Span((1, 6, 17, 5), start=1, stop=9)
    Traceback (most recent call last):
        ...
    ValueError: Positions 1 to 9 are not in a sequence of 4 tokens.
    """

    ids: tuple[int, ...]
    start: int
    stop: int
    position: str = field(default="", compare=False)
    seed: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= len(self.ids):
            raise ValueError(f"Positions {self.start} to {self.stop} are not in a sequence of {len(self.ids)} tokens.")


@checked
@dataclass(frozen=True)
class Position:
    """A rule that says which positions of a thing are read: a row of `POSITIONS`.

    `bounds` gives them as [start, stop) from where the thing starts, where its opening delimiter ends (of a completion;
    else where it starts), and one past its end. `words` say it in a figure.

    >>> from probes import generate, load
    >>> from probes.thinking import POSITIONS
    >>> (completion,) = generate(load("organism"), ["a 3 b +4 c *7"])
    >>> {name: POSITIONS[name](completion).start for name in ("thinking", "first", "last")}
    {'thinking': 7, 'first': 8, 'last': 17}
    >>> POSITIONS["text_last"].within((1, 6, 17, 5), 0, 0, 4)
    Span(ids=(1, 6, 17, 5), start=3, stop=4, position='text_last', seed=None)
    """

    name: str
    of: Thing
    words: str
    bounds: Callable[[int, int, int], tuple[int, int]]

    def within(self, ids: Sequence[int], start: int, first: int, end: int, *, seed: int | None = None) -> Span:
        """The span of a thing that lies at [start, end) in `ids`, which are kept as far as they are read."""
        low, high = self.bounds(start, first, end)
        return Span(tuple(ids[:high]), low, high, self.name, seed)

    def __call__(self, completion: Completion) -> Span:
        """The span of a completion's thinking. Raises ValueError where it has none, or the rule is about texts."""
        if self.of != "completion":
            raise ValueError(f"The position {self.name!r} is one of a {self.of}, not of a completion.")
        span = completion.span
        if span is None:
            raise ValueError(f"Completion {completion.id!r} has no thinking to read.")
        return self.within(completion.all_ids, span.start, span.first, span.end, seed=completion.sampling.seed)


POSITIONS: Mapping[str, Position] = {
    position.name: position
    for position in (
        Position(
            "thinking", "completion", "mean over the thinking", lambda start, _, end: (max(start - 1, 0), end - 1)
        ),
        Position("first", "completion", "at the first thought", lambda _, first, __: (first, first + 1)),
        Position("last", "completion", "at the last thought", lambda _, __, end: (end - 2, end - 1)),
        Position("text", "text", "mean over the text", lambda start, _, end: (start, end)),
        Position("text_last", "text", "at the text's last token", lambda _, __, end: (end - 1, end)),
        Position("segment", "segment", "mean over the segment", lambda start, _, end: (start - 1, end - 1)),
        Position("before", "segment", "at the token before the segment", lambda start, _, __: (start - 1, start)),
    )
}


@checked
def position_named(name: str, of: Thing) -> Position:
    """The position of that name for completions, texts or segments. Raises ValueError for another name.

    >>> from probes.thinking import position_named
    >>> position_named("first", "completion").words
    'at the first thought'
    >>> position_named("first", "text")
    Traceback (most recent call last):
        ...
    ValueError: 'first' is no position of a text. Known: text, text_last.
    """
    known = [position.name for position in POSITIONS.values() if position.of == of]
    if name not in known:
        raise ValueError(f"{name!r} is no position of a {of}. Known: {', '.join(known)}.")
    return POSITIONS[name]


def thinking(completion: Completion) -> Span:
    """[start-1, end-1): the positions whose next token is a token of the thinking (ThinkEdit).

    Raises ValueError where there is none.

    >>> from probes import generate, load
    >>> from probes.thinking import thinking
    >>> (completion,) = generate(load("organism"), ["a 3 b +4 c *7"])
    >>> span = thinking(completion)
    >>> span.start, span.stop, completion.span.start, completion.span.end
    (7, 18, 8, 19)
    """
    return POSITIONS["thinking"](completion)


def first_thought(completion: Completion) -> Span:
    """The one position that predicts the first thought: the last token of the opening delimiter.

    Raises ValueError where there is no thinking.

    >>> from probes import generate, load
    >>> from probes.thinking import first_thought
    >>> (completion,) = generate(load("organism"), ["a 3 b +4 c *7"])
    >>> span = first_thought(completion)
    >>> span.start, span.stop, span.ids[span.start]  # <think> has the id 3
    (8, 9, 3)
    """
    return POSITIONS["first"](completion)


def last_thought(completion: Completion) -> Span:
    """The last of the positions of `thinking`: it predicts the end of the closing delimiter.

    Raises ValueError where there is no thinking.

    >>> from probes import generate, load
    >>> from probes.thinking import last_thought
    >>> (completion,) = generate(load("organism"), ["a 3 b +4 c *7"])
    >>> span = last_thought(completion)
    >>> span.start, span.stop, completion.all_ids[span.stop]  # </think> has the id 4
    (17, 18, 4)
    """
    return POSITIONS["last"](completion)


def text_span(model: PreTrainedModel, text: str, *, position: str = "text") -> Span:
    """A plain text, read at all its tokens (`text`) or at its last one (`text_last`).

    Raises ValueError for another position.

    >>> from probes.model import load
    >>> from probes.thinking import text_span
    >>> model = load("organism")
    >>> text_span(model, "a 3 b +4")
    Span(ids=(6, 17, 7, 27), start=0, stop=4, position='text', seed=None)
    >>> text_span(model, "a 3 b +4", position="text_last").start
    3
    """
    ids = tokenizer_of(model).encode(text)
    return position_named(position, "text").within(ids, 0, 0, len(ids))


def text_spans(model: PreTrainedModel, path: Path, *, position: str = "text") -> list[Span]:
    r"""Spans of a JSONL file: completions of ours at their thinking, or lines of `{"text": ...}` as plain texts.

    Raises ValueError, with the line's number, for a line that is neither.

    >>> from pathlib import Path
    >>> from probes.model import load
    >>> from probes.thinking import text_spans
    >>> _ = Path("texts.jsonl").write_text('{"text": "a 3 b +4"}\n{"text": "a 5"}\n')
    >>> [len(span.ids) for span in text_spans(load("organism"), Path("texts.jsonl"))]
    [4, 2]
    """
    spans = []
    for where, fields in read_json_lines(path):
        with reading(path, "file of texts or completions"):
            if "text" not in fields:
                spans.append(thinking(Completion.from_dict(fields, where)))
                continue
            check_keys(fields, ("text",), where)
            if not isinstance(fields["text"], str):
                raise ValueError(f"{where} has a text that is none: {str(fields['text'])[:60]}.")
            spans.append(text_span(model, fields["text"], position=position))
    return spans
