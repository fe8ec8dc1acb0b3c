"""A small table that prints in a terminal, shows itself in Jupyter, and becomes a pandas frame."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    title: str = ""

    def to_frame(self) -> "pandas.DataFrame":
        import pandas

        return pandas.DataFrame(list(self.rows), columns=list(self.columns))

    def __rich__(self) -> RichTable:
        table = RichTable(title=Text(self.title) if self.title else None)
        for i, column in enumerate(self.columns):
            numeric = all(isinstance(row[i], int | float) for row in self.rows)
            table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(text_of(cell)) for cell in row))
        return table

    def _repr_html_(self) -> str:
        return html_table(self.columns, self.rows, self.title)


def html_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(text_of(cell))}</{tag}>" for cell in cells) + "</tr>"

    caption = f"<caption>{escape(title)}</caption>" if title else ""
    body = "".join(line(row, "td") for row in rows)
    return f"<table>{caption}<thead>{line(columns, 'th')}</thead><tbody>{body}</tbody></table>"


def text_of(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
