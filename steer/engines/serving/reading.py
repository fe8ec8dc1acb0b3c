"""A turn read token by token: what of the thinking and of the answer can be told so far, in whole letters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from probes.model.delimiters import Delimiters, read_turn, thinking_span
from probes.model.tokens import decode

Said = tuple[str, str]  # the field of an answer, and what is added to it
THINKING, ANSWER, TEXT = "reasoning_content", "content", "text"


class Growing:
    """The text of tokens that come one by one. What is told never changes: of a letter cut in two, nothing is told."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, special: bool) -> None:
        self.tokenizer, self.special = tokenizer, special
        self._ids: list[int] = []
        self._told = 0  # of the ids, those whose text was told

    def add(self, token: int) -> str:
        """The text that is new."""
        self._ids.append(token)
        before = decode(self.tokenizer, self._ids[: self._told], special=self.special)
        whole = decode(self.tokenizer, self._ids, special=self.special)
        if len(whole) <= len(before) or whole.endswith("\ufffd"):
            return ""
        self._ids, self._told = self._ids[self._told :], len(self._ids) - self._told
        return whole[len(before) :]


class Held:
    """A text on its way out: space is held back at both ends, and so is what may be the beginning of its end."""

    def __init__(self, closing: str = "") -> None:
        self.closing, self.told, self._held = closing, 0, ""

    def add(self, text: str) -> str:
        """What can be told."""
        self._held += text
        if not self.told:
            self._held = self._held.lstrip()
        sure = self._held[: len(self._held) - self._doubtful()].rstrip()
        self._held = self._held[len(sure) :]
        self.told += len(sure)
        return sure

    def _doubtful(self) -> int:
        sizes = range(min(len(self.closing) - 1, len(self._held)), 0, -1)
        return next((n for n in sizes if self.closing.startswith(self._held[-n:])), 0)


@dataclass(frozen=True)
class Turn:
    """A turn that is over."""

    thinking: str | None
    answer: str
    thoughts: int  # tokens of the thinking


def turn_of(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int], delimiters: Delimiters
) -> Turn:
    """As a completion has it."""
    span, thinking, answer = read_turn(tokenizer, prompt, ids, delimiters)
    return Turn(thinking, answer, 0 if span is None else span.end - span.start)


class Reader:
    """Tells of a turn what is sure, and at its end the rest, so that in the end it is what `read_turn` reads.

    Nothing is sure before it is known whether the turn thinks; nor, where the answer is written in channels, which of
    them is the last.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, delimiters: Delimiters, prompt: Sequence[int]) -> None:
        self.tokenizer, self.delimiters, self.prompt = tokenizer, delimiters, list(prompt)
        self.ids: list[int] = []
        d = delimiters
        closing = d.close_text.text if d.close_text is not None else decode(tokenizer, d.close) if d.close else ""
        self._held = {THINKING: Held(closing), ANSWER: Held()}
        opening = 0 if d.open_text is None else len(d.open_text.text)
        self._window = max(len(d.open), len(d.close), opening, len(closing)) + 1  # a token has a letter, or more
        self._channels = len(d.open) > 2 and set(d.open[:1] + d.open[-1:]) <= set(tokenizer.all_special_ids)
        self._start = 0
        off = not d.open or thinking_span(prompt, d.open, d) is None
        self._section = "" if not off and thinking_span(prompt, (), d) is None else ANSWER if off else THINKING
        self._growing = Growing(tokenizer, special=self._section == THINKING)

    def add(self, token: int) -> Iterator[Said]:
        """What one token more tells."""
        self.ids.append(token)
        near = max(self._start, len(self.ids) - self._window)
        if not self._section:
            if opened := self.delimiters.opening(self.ids, near):
                yield from self._enter(THINKING, opened.after)
        elif self._section == THINKING and (closed := self.delimiters.closing(self.ids, near)):
            yield from self._rest(THINKING, turn_of(self.tokenizer, self.prompt, self.ids, self.delimiters).thinking)
            yield from self._enter(ANSWER, closed.after)
        elif self._section == THINKING or not self._channels:
            yield from self._tell(self._growing.add(token))

    def end(self, turn: Turn) -> Iterator[Said]:
        """What was not sure before, now that the turn is over."""
        yield from self._rest(THINKING, turn.thinking)
        yield from self._rest(ANSWER, turn.answer)

    def _enter(self, section: str, begins: str) -> Iterator[Said]:
        self._section, self._start = section, len(self.ids)
        self._growing = Growing(self.tokenizer, special=section == THINKING)
        if section == THINKING or not self._channels:
            yield from self._tell(begins)

    def _tell(self, text: str) -> Iterator[Said]:
        if new := self._held[self._section].add(text):
            yield self._section, new

    def _rest(self, section: str, whole: str | None) -> Iterator[Said]:
        held = self._held[section]
        if rest := (whole or "")[held.told :]:
            held.told += len(rest)
            yield section, rest


class Plain:
    """Tells a text that goes on from its prompt, all of it as it is but for special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._growing, self._told = Growing(tokenizer, special=False), 0

    def add(self, token: int) -> Iterator[Said]:
        """What one token more tells."""
        if new := self._growing.add(token):
            self._told += len(new)
            yield TEXT, new

    def end(self, turn: Turn) -> Iterator[Said]:
        """What was held back."""
        if rest := turn.answer[self._told :]:
            yield TEXT, rest
