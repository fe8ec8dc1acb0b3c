"""Where in a chain something is read: spans of positions."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from probes.files import check_keys
from probes.generation.completions import Completion
from probes.model.loading import tokenizer_of


@dataclass(frozen=True)
class Span:
    """Token ids, and the positions [start, stop) of them that are read."""

    ids: tuple[int, ...]
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= len(self.ids):
            raise ValueError(f"Positions {self.start} to {self.stop} are not in a sequence of {len(self.ids)} tokens.")


Position = Callable[[Completion], Span]


def thinking(completion: Completion) -> Span:
    """[start-1, end-1): the positions whose next token is a token of the thinking (ThinkEdit)."""
    span = _thought(completion)
    start = max(span.start - 1, 0)
    return Span(completion.all_ids[: span.end - 1], start, span.end - 1)


def first_thought(completion: Completion) -> Span:
    """The one position that predicts the first thought: the last token of the opening delimiter."""
    span = _thought(completion)
    return Span(completion.all_ids[: span.first + 1], span.first, span.first + 1)


def last_thought(completion: Completion) -> Span:
    """The last of the positions of `thinking`: it predicts the end of the closing delimiter."""
    end = thinking(completion).stop
    return Span(completion.all_ids[:end], end - 1, end)


POSITIONS: Mapping[str, Position] = {"thinking": thinking, "first": first_thought}


def text_span(model: PreTrainedModel, text: str, *, last: bool = False) -> Span:
    """All tokens of a plain text, or its last one."""
    ids = tuple(tokenizer_of(model).encode(text))
    return Span(ids, len(ids) - 1 if last else 0, len(ids))


def text_spans(model: PreTrainedModel, path: Path, *, last: bool = False) -> list[Span]:
    """Spans of a JSONL file: completions of ours at their thinking, or lines of `{"text": ...}` as plain texts."""
    lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
    spans = []
    for number, line in enumerate(lines, start=1):
        words = json.loads(line)
        if "text" in words:
            check_keys(words, ("text",), f"Line {number} of {path}")
            spans.append(text_span(model, words["text"], last=last))
        else:
            spans.append(thinking(Completion.from_line(line)))
    return spans


def _thought(completion: Completion):
    if completion.span is None:
        raise ValueError(f"Completion {completion.id!r} has no thinking to read.")
    return completion.span
