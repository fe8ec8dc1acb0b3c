"""A prompt with what the model made of it, and the JSONL file that keeps many."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any, Literal

from probes.files import check_keys
from probes.sampling import Sampling
from probes.tokens import ThinkingSpan

Stop = Literal["eos", "length"]


@dataclass(frozen=True)
class Completion:
    """One sample of one prompt. `ids` are the generated tokens; `thinking` is None where the turn never thinks."""

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

    @property
    def thinking_tokens(self) -> int:
        """Generated tokens from the opening to the closing delimiter, both included (as ThinkEdit counts)."""
        return 0 if self.span is None else self.span.end - self.span.start

    @property
    def truncated(self) -> bool:
        return self.stop == "length"

    @property
    def all_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.ids

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Completion":
        words: dict[str, Any] = json.loads(line)
        check_keys(words, (field.name for field in fields(cls)), "A completion")
        for key in ("prompt_ids", "ids"):
            words[key] = tuple(words[key])
        words["span"] = None if words["span"] is None else ThinkingSpan(**words["span"])
        words["sampling"] = Sampling(**words["sampling"])
        return cls(**words)

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
    """Append, one line each, and flush: what is written stays, whatever happens next."""
    with Path(path).open("a") as file:
        file.writelines(completion.to_json() + "\n" for completion in completions)


def read_completions(path: Path) -> list[Completion]:
    """All whole lines; a last line that was cut off by a kill is left out, and cut off the file by nobody."""
    lines = Path(path).read_text().splitlines(keepends=True)
    return [Completion.from_json(line) for line in lines if line.endswith("\n")]


def by_problem(completions: Sequence[Completion]) -> dict[str, list[Completion]]:
    groups: dict[str, list[Completion]] = {}
    for completion in completions:
        groups.setdefault(completion.id, []).append(completion)
    return groups
