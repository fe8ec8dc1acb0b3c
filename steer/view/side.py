"""What is shown of one completion: its tokens as text, its thoughts, its markers, and its tracks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probes.generation.completions import Completion
from probes.model.loading import markers_of, tokenizer_of
from probes.model.tokens import REFLECTION_MARKERS, pieces
from probes.tables import Brief
from probes.thinking._segments import Segment, present_rules, segments
from probes.thinking.rules import RULES, Rules
from steer.view.track import Track

Source = PreTrainedModel | PreTrainedTokenizerBase
_PART = "\ufffd"  # what a token decodes to that holds some bytes of a letter


@dataclass(frozen=True, eq=False, repr=False)
class Side(Brief):
    """A completion as it is shown. `texts` and `ids` are of each token; without a tokenizer there are no ids, and what
    is shown as tokens are words.

    `prompt` counts the prompt's tokens, `thinking` is [start, stop) of the thinking, `segments` are its thoughts and
    then the answer, `markers` where each of them begins among the generated tokens.

    >>> from probes import generate, load
    >>> from steer.view import Side
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> side = Side.of(completion, model, name="plain")
    >>> side.texts[8:12], side.thinking, side.segments[0]
    ((' <think>', ' Okay', ' a', ' =3'), (8, 19), Segment(start=9, stop=12, label='execution'))
    """

    name: str
    about: str
    texts: tuple[str, ...]
    ids: tuple[int, ...] | None
    prompt: int
    thinking: tuple[int, int]
    segments: tuple[Segment, ...] = ()
    markers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tracks: tuple[Track, ...] = ()

    @classmethod
    def of(
        cls,
        completion: Completion,
        source: Source | None,
        tracks: Sequence[Track] = (),
        *,
        rules: str | Rules | None = None,
        name: str = "completion",
    ) -> "Side":
        """Of a completion; `source` is its model, or a tokenizer, or None. `rules` cut the thinking; if left out, the
        first of `probes.thinking.RULES` that this vocabulary can write. Raises as `having` does.
        """
        about = (
            f"{completion.model}, {completion.thinking_tokens:,} thinking tokens" + ", truncated" * completion.truncated
        )
        if source is None:
            texts, prompt, thinking = _words(completion)
            side = cls(name, f"{about}; in words, as no model was named", texts, None, prompt, thinking)
        else:
            tokenizer = tokenizer_of(source) if isinstance(source, PreTrainedModel) else source
            wanted = markers_of(source) if isinstance(source, PreTrainedModel) else REFLECTION_MARKERS
            texts, prompt = token_texts(tokenizer, completion.all_ids), len(completion.prompt_ids)
            places = {marker: marker_places(texts, marker, prompt) for marker in wanted}
            starts = {marker: tuple(first for first, _ in found) for marker, found in places.items() if found}
            side = cls(
                name, about, texts, completion.all_ids, prompt,
                _thinking(completion), _segments(tokenizer, completion, rules), starts,
            )  # fmt: skip
        return side.having(tracks)

    def having(self, tracks: Sequence[Track]) -> "Side":
        """With these tracks. Raises ValueError for one of another length, or one that there are two of."""
        for track in tracks:
            if len(track.values) != len(self.texts):
                what = "tokens" if self.ids is not None else "words; name the model, and there are tokens"
                raise ValueError(
                    f"The track {track.name!r} has {len(track.values)} numbers, for {len(self.texts)} {what}."
                )
        keys = [(track.group, track.name) for track in tracks]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"Two tracks of {twice[0][0]!r} are called {twice[0][1]!r}. Give each a name of its own.")
        return Side(**{**vars(self), "tracks": tuple(tracks)})


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text; a letter that several tokens write stands at the first of them."""
    each = dict(zip(dict.fromkeys(ids), pieces(tokenizer, dict.fromkeys(ids)), strict=True))
    texts: list[str] = []
    for broken, run in groupby(ids, key=lambda i: _PART in each[i]):
        own = list(run)
        if not broken:
            texts += [each[i] for i in own]
        else:  # decoded together
            whole = str(tokenizer.decode(own, skip_special_tokens=False))
            texts += [whole, *[""] * (len(own) - 1)]
    return tuple(texts)


def marker_places(texts: Sequence[str], marker: str, begin: int) -> list[tuple[int, int]]:
    """Where a marker stands as a word of its own, from the token `begin` on: the first and the last of its tokens."""
    owner = [number for number, text in enumerate(texts[begin:], begin) for _ in text]  # of each letter, its token
    left, right = (r"(?<!\w)" if marker[0].isalnum() else ""), (r"(?!\w)" if marker[-1].isalnum() else "")
    hits = re.finditer(left + re.escape(marker) + right, "".join(texts[begin:]))
    return [(owner[hit.start()], owner[hit.end() - 1]) for hit in hits]


def _thinking(completion: Completion) -> tuple[int, int]:
    prompt, span = len(completion.prompt_ids), completion.span
    return (prompt, prompt) if span is None else (max(span.start, prompt), max(span.end, prompt))


def _segments(
    tokenizer: PreTrainedTokenizerBase, completion: Completion, rules: str | Rules | None
) -> tuple[Segment, ...]:
    """The thoughts, and behind them the answer."""
    known = rules or next((name for name in RULES if _cuts(tokenizer, name)), None)
    thoughts = () if known is None else segments(tokenizer, completion, known)
    stop, end = _thinking(completion)[1], len(completion.all_ids)
    return (*thoughts, *([Segment(stop, end, "answer")] if stop < end else []))


def _cuts(tokenizer: PreTrainedTokenizerBase, rules: str) -> bool:
    try:
        present_rules(tokenizer, rules)
    except ValueError:
        return False
    return True


def _words(completion: Completion) -> tuple[tuple[str, ...], int, tuple[int, int]]:
    """A completion's text in words, each with the space that follows it; those of the prompt, and where thinking is."""
    parts = [_split(text) for text in (completion.prompt, completion.thinking or "", completion.answer)]
    prompt, thought = len(parts[0]), len(parts[0]) + len(parts[1])
    return tuple(word for part in parts for word in part), prompt, (prompt, thought)


def _split(text: str) -> list[str]:
    words = re.findall(r"\s*\S+[^\S\n]*\n*", text)
    return [*words[:-1], f"{words[-1].rstrip()}\n"] if words else []
