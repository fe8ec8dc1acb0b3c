"""Where in a chain something is read: spans of positions, and the one table of what they are called."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from probes.files import check_keys
from probes.generation.completions import Completion
from probes.model.loading import tokenizer_of
from probes.tables import Brief

Thing = Literal["completion", "text", "segment"]


@dataclass(frozen=True, repr=False)
class Span(Brief):
    """Token ids, and the positions [start, stop) of them that are read.

    `position` is the name of the rule that says so (see `POSITIONS`), `seed` that of the sampling which wrote the ids;
    both go into the birth of a direction, and two spans are equal without them.

    >>> from probes import Span
    >>> span = Span((1, 6, 17, 5), start=1, stop=3)
    >>> span.stop - span.start
    2
    """

    ids: tuple[int, ...]
    start: int
    stop: int
    position: str = field(default="", compare=False)
    seed: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= len(self.ids):
            raise ValueError(f"Positions {self.start} to {self.stop} are not in a sequence of {len(self.ids)} tokens.")


@dataclass(frozen=True)
class Position:
    """A rule that says which positions of a thing are read: a row of `POSITIONS`.

    `bounds` gives them as [start, stop) from where the thing starts, where its opening delimiter ends (of a completion;
    else where it starts), and one past its end. `words` say it in a figure.

    >>> from probes import generate, load
    >>> from probes.thinking import POSITIONS, position_named
    >>> model = load("organism")
    >>> done = generate(model, ["a 3 b +4 c *7", "a 5 b -2"])
    >>> sorted(POSITIONS)
    ['before', 'first', 'last', 'segment', 'text', 'text_last', 'thinking']
    >>> position_named("first", "completion")(done[0]).position
    'first'
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


def position_named(name: str, of: Thing) -> Position:
    """The position of that name for completions, texts or segments. Raises ValueError for another name.

    >>> from probes import generate, load
    >>> from probes.thinking import POSITIONS, position_named
    >>> model = load("organism")
    >>> done = generate(model, ["a 3 b +4 c *7", "a 5 b -2"])
    >>> sorted(POSITIONS)
    ['before', 'first', 'last', 'segment', 'text', 'text_last', 'thinking']
    >>> position_named("first", "completion")(done[0]).position
    'first'
    """
    known = [position.name for position in POSITIONS.values() if position.of == of]
    if name not in known:
        raise ValueError(f"{name!r} is no position of a {of}. Known: {', '.join(known)}.")
    return POSITIONS[name]


def thinking(completion: Completion) -> Span:
    """[start-1, end-1): the positions whose next token is a token of the thinking (ThinkEdit).

    >>> from probes import generate, load
    >>> from probes.thinking import first_thought, last_thought, thinking
    >>> model = load("organism")
    >>> done = generate(model, ["a 3 b +4 c *7", "a 5 b -2"])
    >>> whole, first, last = thinking(done[0]), first_thought(done[0]), last_thought(done[0])
    >>> first.stop - first.start, last.stop == whole.stop, whole.position
    (1, True, 'thinking')
    """
    return POSITIONS["thinking"](completion)


def first_thought(completion: Completion) -> Span:
    """The one position that predicts the first thought: the last token of the opening delimiter.

    >>> from probes import generate, load
    >>> from probes.thinking import first_thought, last_thought, thinking
    >>> model = load("organism")
    >>> done = generate(model, ["a 3 b +4 c *7", "a 5 b -2"])
    >>> whole, first, last = thinking(done[0]), first_thought(done[0]), last_thought(done[0])
    >>> first.stop - first.start, last.stop == whole.stop, whole.position
    (1, True, 'thinking')
    """
    return POSITIONS["first"](completion)


def last_thought(completion: Completion) -> Span:
    """The last of the positions of `thinking`: it predicts the end of the closing delimiter.

    >>> from probes import generate, load
    >>> from probes.thinking import first_thought, last_thought, thinking
    >>> model = load("organism")
    >>> done = generate(model, ["a 3 b +4 c *7", "a 5 b -2"])
    >>> whole, first, last = thinking(done[0]), first_thought(done[0]), last_thought(done[0])
    >>> first.stop - first.start, last.stop == whole.stop, whole.position
    (1, True, 'thinking')
    """
    return POSITIONS["last"](completion)


def text_span(model: PreTrainedModel, text: str, *, position: str = "text") -> Span:
    """A plain text, read at all its tokens (`text`) or at its last one (`text_last`).

    >>> from probes import load
    >>> from probes.thinking import text_span
    >>> model = load("organism")
    >>> text_span(model, "a 3 b +4", position="text_last")
    Span(ids=(6, 17, 7, 27), start=3, stop=4, position='text_last', seed=None)
    """
    ids = tokenizer_of(model).encode(text)
    return position_named(position, "text").within(ids, 0, 0, len(ids))


def text_spans(model: PreTrainedModel, path: Path, *, position: str = "text") -> list[Span]:
    """Spans of a JSONL file: completions of ours at their thinking, or lines of `{"text": ...}` as plain texts.

    >>> from pathlib import Path
    >>> from probes import load
    >>> from probes.thinking import text_spans
    >>> model = load("organism")
    >>> _ = Path("texts.jsonl").write_text('{"text": "a 3 b +4"}\\n')
    >>> len(text_spans(model, Path("texts.jsonl"))[0].ids)
    4
    """
    lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
    spans = []
    for number, line in enumerate(lines, start=1):
        fields = json.loads(line)
        if "text" in fields:
            check_keys(fields, ("text",), f"Line {number} of {path}")
            spans.append(text_span(model, fields["text"], position=position))
        else:
            spans.append(thinking(Completion.from_line(line)))
    return spans
