"""From messages to token ids, and from ids to text."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from probes.words import checked

Message = Mapping[str, str]
Prompt = str | Sequence[Message]
Template = Mapping[str, Any] | Literal["raw"]

REFLECTION_MARKERS: tuple[str, ...] = ("Wait", "Alternatively", "Hmm", "But", "\n\n")


def check_prompts(prompts: object) -> None:
    """A text is a sequence of letters, and a conversation one of messages: neither is a list of prompts."""
    if isinstance(prompts, str | bytes):
        raise ValueError(f"One prompt was given as such, {prompts!r:.60}: give a list of prompts, [prompt].")
    if isinstance(prompts, Sequence) and any(isinstance(prompt, Mapping) for prompt in prompts):
        raise ValueError("One conversation was given as such: give a list of conversations, [messages].")


@checked
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


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """What each id adds to a text. Alone, many a tokenizer drops a token's leading space: so after an anchor."""
    (anchor,) = tokenizer.encode("a", add_special_tokens=False)[-1:]
    rows = [[anchor], *([anchor, i] for i in ids)]
    head, *texts = tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [text.removeprefix(head) for text in texts]


def words_ids(tokenizer: PreTrainedTokenizerBase, words: str, what: str) -> tuple[int, ...]:
    """The token ids of words, which are a `what`. Raises ValueError where the vocabulary cannot write them."""
    ids = tuple(tokenizer.encode(words, add_special_tokens=False))
    if not ids or decode(tokenizer, ids).strip() != words.strip():
        raise ValueError(
            f"The vocabulary of {tokenizer.name_or_path!r} cannot write the {what} {words!r}. Name another."
        )
    return ids


def present_markers(
    tokenizer: PreTrainedTokenizerBase, markers: Sequence[str] = REFLECTION_MARKERS
) -> tuple[dict[str, list[tuple[int, ...]]], tuple[str, ...]]:
    """Each marker's ids, with and without a space before it, and the markers that this vocabulary lacks.

    A marker is lacking where its ids do not decode to it again, as happens with an unknown word.
    """
    found: dict[str, list[tuple[int, ...]]] = {}
    for marker in markers:
        if kept := spellings(tokenizer, (marker, " " + marker), (marker,)):
            found[marker] = kept
    return found, tuple(marker for marker in markers if marker not in found)


def spellings(
    tokenizer: PreTrainedTokenizerBase, forms: Iterable[str], meant: Collection[str]
) -> list[tuple[int, ...]]:
    """The forms as ids, each once, in order; without those that do not decode to what is `meant`, but for spaces."""
    ways = {tuple(tokenizer.encode(form, add_special_tokens=False)) for form in forms}
    return [ids for ids in sorted(ways) if ids and decode(tokenizer, ids).strip(" ") in meant]
