"""From messages to token ids: chat template, thinking delimiters, and the span of the thinking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
Prompt = str | Sequence[Message]
Template = Mapping[str, Any] | Literal["raw"]

# What opens and closes the thinking in published models.
KNOWN_DELIMITERS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)
REFLECTION_MARKERS: tuple[str, ...] = ("Wait", "Alternatively", "Hmm", "But", "\n\n")


@dataclass(frozen=True)
class Delimiters:
    """Token ids that open the model's turn, open its thinking, and close it.

    `turn` is what the chat template puts between the user's words and the model's, `user` what it puts before the
    user's; empty where unknown, and then a clock cannot tell earlier turns from this one. A model may write `turn`
    within its turn (gpt-oss does, between channels): only the first one after `user` opens a turn.

    >>> from probes.model import Delimiters, delimiters_of, load
    >>> delimiters_of(load("organism"))
    Delimiters(open=(3,), close=(4,), turn=(5,), user=(1,))
    >>> model = load("organism", delimiters=Delimiters(open=(3,), close=(4,)))  # the header of a turn left unknown
    >>> delimiters_of(model).turn
    ()
    """

    open: tuple[int, ...]
    close: tuple[int, ...]
    turn: tuple[int, ...] = ()
    user: tuple[int, ...] = ()


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


def check_prompts(prompts: object) -> None:
    """A text is a sequence of letters, and a conversation one of messages: neither is a list of prompts."""
    if isinstance(prompts, str | bytes):
        raise ValueError(f"One prompt was given as such, {prompts!r:.60}: give a list of prompts, [prompt].")
    if isinstance(prompts, Sequence) and any(isinstance(prompt, Mapping) for prompt in prompts):
        raise ValueError("One conversation was given as such: give a list of conversations, [messages].")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, template: Template | None = None) -> list[int]:
    """Ids of a user's words, or of a conversation, up to where the model speaks.

    `template` holds arguments of the chat template, such as `{"enable_thinking": False}`; `"raw"` writes a text as it
    is, without one, as a base model reads it. Raises ValueError where the tokenizer has no chat template, and for a
    conversation that should be raw.

    >>> from probes.model import decode, encode_prompt, load, tokenizer_of
    >>> tokenizer = tokenizer_of(load("organism"))
    >>> ids = encode_prompt(tokenizer, "a 3 b +4")
    >>> ids, decode(tokenizer, ids)
    ([1, 6, 17, 7, 27, 5], '<bos> a 3 b +4 ?')
    >>> decode(tokenizer, encode_prompt(tokenizer, "a 3", template={"enable_thinking": False}))
    '<bos> a 3 ? <think> </think>'
    """
    if isinstance(template, str):
        if template != "raw":
            raise ValueError(f"{template!r} is no template. Known: 'raw', or the arguments of the chat template.")
        if not isinstance(prompt, str):
            raise ValueError("A conversation cannot be written raw: give its text, or leave template='raw' out.")
        return [int(token) for token in tokenizer.encode(prompt)]
    if not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, so a prompt cannot be written as the "
            "model was trained to read it. Set tokenizer.chat_template, load the instruction-tuned model, or give "
            "template='raw' for a base model."
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **dict(template or {})
    )
    return [int(token) for token in encoded["input_ids"]]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = True) -> str:
    """The text of token ids, with or without special tokens.

    >>> from probes.model import decode, load, tokenizer_of
    >>> tokenizer = tokenizer_of(load("organism"))
    >>> decode(tokenizer, [3, 56, 4, 21, 2]), decode(tokenizer, [3, 56, 4, 21, 2], special=False)
    ('<think> Okay </think> 7 <eos>', 'Okay 7')
    """
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special))


def words_ids(tokenizer: PreTrainedTokenizerBase, words: str, what: str) -> tuple[int, ...]:
    """The token ids of words, which are a `what`. Raises ValueError where the vocabulary cannot write them."""
    ids = tuple(tokenizer.encode(words, add_special_tokens=False))
    if not ids or decode(tokenizer, ids).strip() != words.strip():
        raise ValueError(
            f"The vocabulary of {tokenizer.name_or_path!r} cannot write the {what} {words!r}. Name another."
        )
    return ids


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
    return Delimiters(opens, closes, *_headers(tokenizer, opens))


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


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> Sequence[int]:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:same]


def find(ids: Sequence[int], wanted: Sequence[int], start: int = 0) -> int | None:
    """Where `wanted` first begins in `ids`, from `start` on."""
    for at in range(start, len(ids) - len(wanted) + 1):
        if tuple(ids[at : at + len(wanted)]) == tuple(wanted):
            return at
    return None


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
    ids, begin = [*prompt_ids, *completion_ids], len(prompt_ids)
    opens, closes = delimiters.open, delimiters.close
    if not opens:
        return None
    at = find(ids, opens, _turn_start(prompt_ids, delimiters))
    if at is None:
        return None
    first = at + len(opens) - 1
    closing = find(ids, closes, first + 1)
    if closing is not None and closing + len(closes) <= begin:
        return None  # the prompt opens and closes it: thinking is switched off
    end = len(ids) if closing is None else closing + len(closes)
    return ThinkingSpan(max(at, begin), first, end, closing is not None, len(closes))


def _turn_start(prompt_ids: Sequence[int], delimiters: Delimiters) -> int:
    """One past the last header of a turn in the prompt; without a known header, an unclosed tag or the end."""
    turn = delimiters.turn
    if not turn:
        opened = [
            at
            for at in range(len(prompt_ids))
            if find(prompt_ids[: at + len(delimiters.open)], delimiters.open, at) == at
        ]
        if opened and find(prompt_ids, delimiters.close, opened[-1]) is None:
            return opened[-1]
        return len(prompt_ids)
    start, at = 0, find(prompt_ids, turn)
    while at is not None:
        start = at + len(turn)
        at = find(prompt_ids, turn, start)
    return start


def present_markers(
    tokenizer: PreTrainedTokenizerBase, markers: Sequence[str] = REFLECTION_MARKERS
) -> tuple[dict[str, list[tuple[int, ...]]], tuple[str, ...]]:
    """Each marker's ids, with and without a space before it, and the markers that this vocabulary lacks.

    A marker is lacking where its ids do not decode to it again, as happens with an unknown word.
    """
    found: dict[str, list[tuple[int, ...]]] = {}
    for marker in markers:
        ways = {tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (marker, " " + marker)}
        kept = [ids for ids in sorted(ways) if ids and decode(tokenizer, ids).strip(" ") == marker]
        if kept:
            found[marker] = kept
    return found, tuple(marker for marker in markers if marker not in found)
