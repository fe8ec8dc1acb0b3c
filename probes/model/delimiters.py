"""What opens and closes the thinking, and where it is in a run of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from probes.model.tokens import decode, encode_prompt
from probes.needles import Needle

# What opens and closes the thinking in published models.
KNOWN_DELIMITERS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)


@dataclass(frozen=True)
class Delimiters:
    """Token ids that open the model's turn, open its thinking, and close it.

    `turn` is what the chat template puts between the user's words and the model's, `user` what it puts before the
    user's, `tool` what it puts before a tool's result; empty where unknown, and then a clock cannot tell earlier turns
    from this one. A model may write `turn` within its turn (gpt-oss does, between channels): only the first one after
    `user` or `tool` opens a turn. Where a delimiter is ordinary text, whose letters may share a token with what stands
    beside them, it is found by its text, and its ids are how we write it.

    >>> from probes.model import Delimiters, delimiters_of, load
    >>> delimiters_of(load("organism"))
    Delimiters(open=(3,), close=(4,), turn=(5,), user=(1,), tool=())
    >>> model = load("organism", delimiters=Delimiters(open=(3,), close=(4,)))  # the header of a turn left unknown
    >>> delimiters_of(model).turn
    ()
    """

    open: tuple[int, ...]
    close: tuple[int, ...]
    turn: tuple[int, ...] = ()
    user: tuple[int, ...] = ()
    tool: tuple[int, ...] = ()
    open_text: Needle | None = field(default=None, repr=False, compare=False)
    close_text: Needle | None = field(default=None, repr=False, compare=False)

    def opening(self, ids: Sequence[int], start: int = 0) -> "Match | None":
        """Where the thinking is first opened, from `start` on."""
        return _match(ids, self.open, self.open_text, start)

    def closing(self, ids: Sequence[int], start: int = 0) -> "Match | None":
        """Where it is first closed, from `start` on."""
        return _match(ids, self.close, self.close_text, start)


@dataclass(frozen=True)
class Match:
    """A delimiter in a run of tokens, `start` to `end`, and the letters before and after it that share its tokens."""

    start: int
    end: int
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class ThinkingSpan:
    """Positions in prompt + completion. `start`: first token of the thinking, its opening tag included where the
    model wrote it. `first`: last token of the opening tag, which predicts the first thought. `end`: one past
    the closing tag, or the length where `closed` is false. `text_start` and `text_end` bound the generated text between
    the tags.

    >>> from probes import generate, load
    >>> (completion,) = generate(load("organism"), ["a 3 b +4 c *7"])
    >>> span = completion.span
    >>> len(completion.prompt_ids), span.start, span.first, span.end, span.closed
    (8, 8, 8, 19, True)
    >>> completion.all_ids[span.start], completion.all_ids[span.end - 1]  # <think> and </think>
    (3, 4)
    """

    start: int
    first: int
    end: int
    closed: bool
    n_close: int | None = field(default=None, compare=False)  # tokens of the closing tag; not in files of version 0.1

    @property
    def text_start(self) -> int:
        """The first generated token of the thinking after its opening tag."""
        return max(self.first + 1, self.start)

    @property
    def text_end(self) -> int:
        """Raises ValueError for a closed span out of a file of version 0.1, which did not hold it."""
        if not self.closed:
            return self.end
        if self.n_close is None:
            raise ValueError(
                "This span does not say how many tokens its closing tag has, so the end of its text cannot be told: "
                "it comes from a file of version 0.1. Generate the completion again."
            )
        return self.end - self.n_close


def find_delimiters(tokenizer: PreTrainedTokenizerBase, pair: tuple[str, str] | Delimiters | None = None) -> Delimiters:
    """The delimiters given, else those of the known ones that the vocabulary or the chat template holds.

    Raises ValueError where there are none.

    >>> from probes.model import find_delimiters, load, tokenizer_of
    >>> tokenizer = tokenizer_of(load("organism"))
    >>> find_delimiters(tokenizer).open
    (3,)
    >>> find_delimiters(tokenizer, ("Okay", "So")).open
    (56,)
    """
    if isinstance(pair, Delimiters):
        return pair
    if pair is None:
        known = tokenizer.get_vocab()
        template = str(tokenizer.chat_template or "")
        pair = next(((o, c) for o, c in KNOWN_DELIMITERS if o in known or o in template), None)
    if pair is None:
        raise ValueError(
            f"Neither vocabulary nor chat template of {tokenizer.name_or_path!r} has thinking delimiters; looked for "
            f"{', '.join(o for o, _ in KNOWN_DELIMITERS)}. Is it a reasoning model? If so, load it with "
            "delimiters=('<what opens the thinking>', '<what closes it>')."
        )
    opens, closes = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in pair)
    if not opens or not closes:
        raise ValueError(f"The tokenizer turns the delimiters {pair!r} into no tokens.")
    turn, user = _headers(tokenizer, opens)
    needles = (Needle.of(tokenizer, text) for text in pair)
    return Delimiters(opens, closes, turn, user, _tool_header(tokenizer, turn), *needles)


def _headers(tokenizer: PreTrainedTokenizerBase, opens: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands between the user's words and the model's, up to an opening tag; and what stands before the user's.

    Read off prompts that differ in the user's words alone.
    """
    if not tokenizer.chat_template:
        return (), ()
    bare, said = (encode_prompt(tokenizer, text) for text in ("", "a"))
    suffix = tuple(_common_prefix(bare[::-1], said[::-1])[::-1])
    at = find(suffix, opens)
    turn = suffix if at is None else suffix[:at]
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    later = (encode_prompt(tokenizer, [*earlier, {"role": "user", "content": text}]) for text in ("", "a"))
    before, before_later = _common_prefix(bare, said), _common_prefix(*later)
    return turn, tuple(_common_prefix(before[::-1], before_later[::-1])[::-1])


def _tool_header(tokenizer: PreTrainedTokenizerBase, turn: tuple[int, ...]) -> tuple[int, ...]:
    """What stands before a tool's result, as far as no call changes it. Empty where the template has nothing of it."""
    if not turn:
        return ()

    def before(word: str, name: str, *, calls: bool) -> Sequence[int]:
        call: dict[str, Any] = {
            "type": "function",
            "id": f"call{name:0>5}",
            "function": {"name": name, "arguments": {"x": name}},
        }
        asked: dict[str, Any] = {"role": "assistant", "content": word} | ({"tool_calls": [call]} if calls else {})
        turns = [{"role": "user", "content": "a"}, asked]
        result: dict[str, Any] = {"role": "tool", "tool_call_id": f"call{name:0>5}", "name": name}
        return _common_prefix(*(encode_prompt(tokenizer, [*turns, result | {"content": said}]) for said in ("", "b")))

    for calls in (True, False):
        try:
            one, other = before("", "gg", calls=calls), before("f", "f", calls=calls)
        except Exception:  # noqa: BLE001, S112 - a template raises what it likes where it knows no tools
            continue
        header = tuple(_common_prefix(one[::-1], other[::-1])[::-1])
        return header if find(header, turn) is None else ()
    return ()


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> Sequence[int]:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:same]


def find(ids: Sequence[int], wanted: Sequence[int], start: int = 0) -> int | None:
    """Where `wanted` first begins in `ids`, from `start` on."""
    for at in range(start, len(ids) - len(wanted) + 1):
        if tuple(ids[at : at + len(wanted)]) == tuple(wanted):
            return at
    return None


def _match(ids: Sequence[int], wanted: tuple[int, ...], needle: Needle | None, start: int) -> Match | None:
    if needle is not None:
        found = needle.first(ids[start:])
        return None if found is None else Match(found[0] + start, found[1] + start, *found[2:])
    at = find(ids, wanted, start)
    return None if at is None else Match(at, at + len(wanted))


def thinking_span(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], delimiters: Delimiters
) -> ThinkingSpan | None:
    """The thinking of the current turn; earlier turns are prompt. None where the turn never thinks.

    >>> from probes.model import Delimiters, thinking_span
    >>> tags = Delimiters(open=(3,), close=(4,))
    >>> span = thinking_span([1, 6, 17, 5], [3, 56, 48, 4, 17, 2], tags)
    >>> span.start, span.end, span.closed
    (4, 8, True)
    >>> thinking_span([1, 6, 17, 5], [17, 2], tags) is None
    True
    """
    found = _thinking(prompt_ids, completion_ids, delimiters)
    return None if found is None else found[0]


def read_turn(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], said: Sequence[int], delimiters: Delimiters
) -> tuple[ThinkingSpan | None, str | None, str]:
    """The span of the thinking, its text (None without one), and the text of the answer.

    Where the model writes in channels, the answer is what stands after the header of its last one.
    """
    found = _thinking(prompt, said, delimiters)
    whole = [*prompt, *said]
    if found is None:
        return None, None, _answer(tokenizer, said, delimiters).strip()
    span, opened, closed = found
    before = opened.after if opened.end > len(prompt) else ""
    after = "" if closed is None else closed.before
    thinking = before + decode(tokenizer, whole[span.text_start : span.text_end]) + after
    answer = ("" if closed is None else closed.after) + _answer(tokenizer, whole[span.end :], delimiters)
    return span, thinking.strip(), answer.strip()


def _answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], delimiters: Delimiters) -> str:
    """The text of an answer, without the header of the channel it is written in."""
    channel, message = delimiters.open[:1], delimiters.open[-1:]
    begins = find(ids, channel) if len(delimiters.open) > 2 and _is_special(tokenizer, channel + message) else None
    while begins is not None:
        text = find(ids, message, begins)
        ids = [] if text is None else ids[text + 1 :]
        begins = find(ids, channel)
    return decode(tokenizer, ids, special=False)


def _is_special(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    return set(ids) <= set(tokenizer.all_special_ids)


def _thinking(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], delimiters: Delimiters
) -> "tuple[ThinkingSpan, Match, Match | None] | None":
    ids, begin = [*prompt_ids, *completion_ids], len(prompt_ids)
    if not delimiters.open:
        return None
    opened = delimiters.opening(ids, _turn_start(prompt_ids, delimiters))
    if opened is None:
        return None
    closed = delimiters.closing(ids, opened.end)
    if closed is not None and closed.end <= begin:
        return None  # the prompt opens and closes it: thinking is switched off
    end, n_close = (len(ids), len(delimiters.close)) if closed is None else (closed.end, closed.end - closed.start)
    return ThinkingSpan(max(opened.start, begin), opened.end - 1, end, closed is not None, n_close), opened, closed


def _turn_start(prompt_ids: Sequence[int], delimiters: Delimiters) -> int:
    """One past the last header of a turn in the prompt; without a known header, an unclosed tag or the end."""
    turn = delimiters.turn
    if not turn:
        opened = last = delimiters.opening(prompt_ids)
        while opened is not None:
            last, opened = opened, delimiters.opening(prompt_ids, opened.end)
        if last is not None and delimiters.closing(prompt_ids, last.start) is None:
            return last.start
        return len(prompt_ids)
    start, at = 0, find(prompt_ids, turn)
    while at is not None:
        start = at + len(turn)
        at = find(prompt_ids, turn, start)
    return start
