"""A page of the documentation as what it does: its Python, its commands, and what it says they print."""

import doctest
import linecache
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import zip_longest
from pathlib import Path

import pytest

from steer.cli.main import main

ROOT = Path(__file__).parents[1]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SHELLS = ("sh", "bash", "shell")
TRAINING = ("demo", "organism", "donors", "train-reasoner")  # minutes each: their options are read, and no more
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_ROW = re.compile(r"^\| `(steer [^`]+)` \|", flags=re.MULTILINE)
_INLINE = re.compile(r"`(steer [^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """Python, or commands of a shell; `printed` is what the page says comes out, if it says so."""

    line: int
    kind: str
    text: str
    printed: str | None


def pages() -> list[Path]:
    """The README and all pages that are written by hand."""
    found = (page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)
    return [ROOT / "README.md", *sorted(found)]


def blocks(page: str) -> list[Block]:
    """What a page runs, in its order: blocks of Python and of a shell, and the commands that begin a table's rows."""
    fences = list(_FENCE.finditer(page))
    found: list[tuple[int, str, str, str | None]] = [
        (row.start(), "sh", str(row[1]), None)
        for row in _ROW.finditer(page)
        if not any(fence.start() < row.start() < fence.end() for fence in fences)
    ]
    for fence, after in zip_longest(fences, fences[1:]):
        if fence[1] in ("python", *SHELLS):
            near = after is not None and not page[fence.end() : after.start()].strip()
            printed = after[2] if after is not None and near and after[1] in ("text", "output") else None
            found.append((fence.start(), str(fence[1]), str(fence[2]), printed))
    found.sort(key=lambda block: block[0])
    return [Block(page.count("\n", 0, start) + 1, kind, text, printed) for start, kind, text, printed in found]


def commands(text: str) -> Iterator[str]:
    """The lines of a shell block that call `steer`, whole where they go on."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("steer "):
            yield line


def mentioned(page: str) -> set[str]:
    """Commands within the text."""
    return {" ".join(words.split()) for words in _INLINE.findall(_FENCE.sub("", page))}


def runs(command: str) -> bool:
    """Does it name the embedded model, or what the page has made, so that it can run here?"""
    words = shlex.split(command, comments=True)
    return words[1] not in TRAINING and any(word == "organism" or Path(word).exists() for word in words[2:])


def steer(command: str, *more: str) -> str:
    """Run a command in this process; what it prints. Raises AssertionError where it fails."""
    out, code = StringIO(), None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(sys, "argv", [*shlex.split(command, comments=True), *more])
        try:
            main()
        except SystemExit as end:
            code = end.code
    assert not code, f"{command} ended with {code}: {out.getvalue()}"
    return out.getvalue()


def run(block: Block, names: dict[str, object]) -> str:
    """What a block prints. A command that only trains, or needs the hub, is asked for its help, options and all."""
    if block.kind == "python":
        out, text, name = StringIO(), "\n" * block.line + block.text, f"page, line {block.line}"
        linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name  # as cells of a notebook are
        with redirect_stdout(out):
            exec(compile(text, name, "exec"), names)
        return out.getvalue()
    return "".join(steer(command) if runs(command) else check(command) for command in commands(block.text))


def check(command: str) -> str:
    """Raise AssertionError where the command, or an option of it, is not known. Prints nothing."""
    steer(command, "--help")
    return ""


def same(printed: str, got: str) -> bool:
    return doctest.OutputChecker().check_output(printed, got, FLAGS)
