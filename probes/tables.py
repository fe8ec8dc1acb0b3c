"""A small table that prints in a terminal, shows itself in Jupyter, and becomes a pandas frame."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from rich.table import Table as RichTable

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
        table = RichTable(title=self.title or None)
        for i, column in enumerate(self.columns):
            numeric = all(isinstance(row[i], int | float) for row in self.rows)
            table.add_column(column, justify="right" if numeric else "left")
        for row in self.rows:
            table.add_row(*map(text_of, row))
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
