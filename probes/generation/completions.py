"""A prompt with what the model made of it, and the JSONL file that keeps many."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any, BinaryIO, Literal

from probes.fields import from_plain, keys_of
from probes.files import check_regular, reading, staged_file
from probes.generation.sampling import Event, Sampling
from probes.model.delimiters import ThinkingSpan
from probes.tables import Brief
from probes.texts import parse_json
from probes.words import checked

Stop = Literal["eos", "length"]
_OPTIONAL: dict[str, Any] = {"decoding": "", "events": (), "fingerprint": ""}  # not in a file where they say nothing

_VOCABULARY = 1 << 24
_BEGIN = b'{"id": '


@checked
@dataclass(frozen=True, repr=False)
class Completion(Brief):
    """One sample of one prompt. `ids` are the generated tokens; `thinking` is None where the turn never thinks.

    `decoding` names what decided over tokens beside the model, and `events` say what it did at which of `ids`.

    >>> from probes import generate, load
    >>> (completion,) = generate(load("organism"), ["a 3 b +4 c *7"])
    >>> completion.prompt, completion.thinking, completion.answer
    ('<bos> a 3 b +4 c *7 ?', 'Okay a =3 b +4 =7 c *7 =9', '9')
    >>> completion.thinking_tokens, len(completion.ids), completion.stop
    (11, 13, 'eos')
    """

    id: str
    sample: int
    prompt: str
    thinking: str | None
    answer: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    span: ThinkingSpan | None
    stop: Stop
    sampling: Sampling
    model: str
    decoding: str = ""
    events: tuple[Event, ...] = ()
    fingerprint: str = field(default="", compare=False)  # of the weights and recipes that wrote it, in a store

    @property
    def thinking_tokens(self) -> int:
        """Generated tokens from the opening to the closing delimiter, both included (as ThinkEdit counts)."""
        return 0 if self.span is None else self.span.end - self.span.start

    @property
    def truncated(self) -> bool:
        """Did it run into the limit of tokens, or was it ended by a decoding control?"""
        return self.stop == "length"

    @property
    def all_ids(self) -> tuple[int, ...]:
        """Prompt and completion, as the model read them: what `span` counts in."""
        return self.prompt_ids + self.ids

    def to_line(self) -> str:
        """One line of JSON, for a JSONL file."""
        words = asdict(self)
        silent = [key for key in _OPTIONAL if not words[key] and not (key == "events" and self.decoding)]
        return json.dumps({key: value for key, value in words.items() if key not in silent})

    @classmethod
    def from_line(cls, line: str) -> "Completion":
        """Read what `to_line` wrote. Raises ValueError, naming the keys, where some are unknown or missing."""
        return cls.from_dict(parse_json(line, "A completion"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "A completion") -> "Completion":
        """Read the keys of a line; `where` names it in a sentence.

        Raises ValueError for keys that are unknown or missing, for ids that are none and a span that lies outside of
        them, TypeError for a value of another type.
        """
        words = {**_OPTIONAL, **keys_of(values, where)}
        if isinstance(words.get("span"), dict):
            words["span"] = {"n_close": None, **words["span"]}
        made = from_plain(cls, words, where)
        if any(not 0 <= i < _VOCABULARY for i in (*made.prompt_ids, *made.ids)):
            raise ValueError(f"{where} has token ids that no vocabulary has: they are 0 to {_VOCABULARY:,}.")
        span, length = made.span, len(made.prompt_ids) + len(made.ids)
        if span is not None and not 0 <= span.first <= span.end <= length >= span.start >= 0:
            raise ValueError(f"{where} has a span from {span.start} to {span.end}, and {length} tokens.")
        return made

    def _repr_html_(self) -> str:
        def pre(text: str, style: str) -> str:
            return f'<div style="white-space:pre-wrap;{style}">{escape(text)}</div>'

        note = "" if self.stop == "eos" else ", truncated"
        return (
            f"<div><small>{escape(self.model)}, {self.thinking_tokens} thinking tokens{note}</small>"
            + pre(self.prompt, "font-weight:bold")
            + pre(self.thinking or "", "opacity:.7;border-left:3px solid;padding-left:.6em")
            + pre(self.answer, "")
            + "</div>"
        )


def write_completions(path: Path, completions: Iterable[Completion]) -> None:
    """Append to a JSONL file, one line each: what is written stays, whatever happens next.

    A line that a kill cut off goes first.

    >>> from pathlib import Path
    >>> from probes import generate, load, write_completions
    >>> model, path = load("organism"), Path("completions.jsonl")
    >>> write_completions(path, generate(model, ["a 3 b +4 c *7"]))
    >>> write_completions(path, generate(model, ["a 5 b -2 c +9"]))
    >>> len(path.read_text().splitlines())
    2
    """
    with Path(path).open("a+b") as file:
        if file.tell() and not _ends_a_line(file):
            file.seek(0)
            whole, tail = _parted(file.read(), Path(path))
            if tail is None:
                file.truncate(len(whole))
            else:
                file.write(b"\n")  # the last line is whole, but for its end
        file.writelines(completion.to_line().encode() + b"\n" for completion in completions)


def _parted(content: bytes, path: Path) -> tuple[bytes, bytes | None]:
    """The whole lines of a file, and its last line where that is a whole completion without its end; None where a kill
    cut it off. Raises ValueError for a file whose last line was never one of ours: nothing of it is changed."""
    cut = content.rfind(b"\n") + 1
    whole, tail = content[:cut], content[cut:]
    if not tail:
        return whole, None
    try:
        Completion.from_line(tail.decode("utf-8"))
    except (ValueError, TypeError) as error:
        begun = _BEGIN.startswith(tail[: len(_BEGIN)]) or tail.startswith(_BEGIN)
        if not begun:
            raise ValueError(f"{path} is no file of completions, and is left as it is. Name another.") from error
        return whole, None
    return whole, tail


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"


def read_completions(path: Path) -> list[Completion]:
    """All whole lines of a file, in its order; a last line that was cut off by a kill is left out.

    Raises ValueError, naming the keys, for a line that is no completion.

    >>> from pathlib import Path
    >>> from probes import generate, load, read_completions, write_completions
    >>> model, path = load("organism"), Path("completions.jsonl")
    >>> write_completions(path, generate(model, ["a 3 b +4 c *7", "a 5 b -2 c +9"]))
    >>> [c.answer for c in read_completions(path)]
    ['9', '2']
    """
    rows = []
    with reading(path, "file of completions"):
        check_regular(path)
        whole, tail = _parted(Path(path).read_bytes(), Path(path))
        for number, line in enumerate((whole + (tail or b"")).split(b"\n"), start=1):
            if line.strip():
                try:
                    rows.append(Completion.from_line(line.decode("utf-8")))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"Line {number} of {path} is no completion: {error}") from error
    return rows


def order_completions(path: Path, completions: Iterable[Completion]) -> None:
    """Put these first, in their order, and what else the file holds after them. Nothing is lost on the way."""
    held = {(c.id, c.sample): c for c in read_completions(path)}
    wanted = {(c.id, c.sample): c for c in completions}
    if list(held)[: len(wanted)] != list(wanted):
        with staged_file(path) as stage:
            write_completions(stage, {**wanted, **held}.values())


def by_problem(completions: Sequence[Completion]) -> dict[str, list[Completion]]:
    """The completions of each problem, by its id, in order.

    >>> from probes import generate, load
    >>> from probes.generation import by_problem
    >>> groups = by_problem(generate(load("organism"), ["a 3 b +4 c *7", "a 5 b -2 c +9"], samples=3))
    >>> {name: [c.sample for c in group] for name, group in groups.items()}
    {'0': [0, 1, 2], '1': [0, 1, 2]}
    """
    groups: dict[str, list[Completion]] = {}
    for completion in completions:
        groups.setdefault(completion.id, []).append(completion)
    return groups
