"""The model card of an export: what was done, on what evidence, in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from probes.tables import Table, text_of


@dataclass(frozen=True)
class Section:
    """A part of a card: a heading, words, and a table where there is one.

    >>> from probes.tables import Table
    >>> from steer.checkpoints import Section
    >>> Section("Scores", "On 100 problems.", Table(("arm", "accuracy"), (("base", 0.9), ("edited", 0.95)))).heading
    'Scores'
    """

    heading: str
    words: str = ""
    table: Table | None = None


def write_card(path: Path, base_model: str, method: str, sections: Sequence[Section]) -> None:
    """Write the model card of an export: its front matter for the hub, a title, and the sections, tables in Markdown.

    >>> from pathlib import Path
    >>> from steer.checkpoints import Section, write_card
    >>> write_card(Path("README.md"), "organism", "ThinkEdit", [Section("Scores", "On 100 problems.")])
    >>> print(Path("README.md").read_text())
    ---
    base_model: organism
    library_name: transformers
    tags: [thinksteer]
    ---
    <BLANKLINE>
    # organism, edited
    <BLANKLINE>
    Made with ThinkSteer: ThinkEdit. An ordinary checkpoint: it needs no code of ours.
    <BLANKLINE>
    ## Scores
    <BLANKLINE>
    On 100 problems.
    """
    front = f"---\nbase_model: {base_model}\nlibrary_name: transformers\ntags: [thinksteer]\n---\n"
    title = (
        f"# {base_model}, edited\n\nMade with ThinkSteer: {method}. An ordinary checkpoint: it needs no code of ours.\n"
    )
    path.write_text("\n".join([front, title, *map(_section, sections)]), encoding="utf-8")


def _section(section: Section) -> str:
    parts = [f"## {section.heading}\n", section.words]
    if section.table is not None:
        parts.append("\n" + _markdown(section.table))
    return "\n".join(part for part in parts if part) + "\n"


def _markdown(table: Table) -> str:
    lines = [
        list(table.columns),
        ["---"] * len(table.columns),
        *[[_cell(cell) for cell in row] for row in table.rows],
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    """Pipes part cells in Markdown, and a line is a row."""
    return " ".join(text_of(value).replace("|", "\\|").splitlines())
