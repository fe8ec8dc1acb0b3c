"""A small table that prints, shows itself in Jupyter, and becomes a frame; and what shows itself as one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any, final

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from probes.files import printable

if TYPE_CHECKING:
    import pandas

_FEW, _LONGEST = 4, 1000


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    title: str = ""

    def to_frame(self) -> "pandas.DataFrame":
        """The table as a frame of pandas."""

        import pandas

        return pandas.DataFrame(list(self.rows), columns=list(self.columns))

    def __rich__(self) -> RichTable:
        table = RichTable(title=Text(printable(self.title)) if self.title else None)
        for i, column in enumerate(self.columns):
            numeric = all(isinstance(row[i], int | float) for row in self.rows)
            table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(text_of(cell)) for cell in row))
        return table

    def __str__(self) -> str:
        """As a terminal shows it: wide enough that no cell folds."""
        page = StringIO()
        console = Console(file=page, width=10_000)
        console.width = max(1, console.measure(self.__rich__()).maximum)
        console.print(self.__rich__())
        return "\n".join(line.rstrip() for line in page.getvalue().splitlines())

    def __repr__(self) -> str:
        return f"Table({len(self.rows)} rows of {', '.join(self.columns)})"[:_LONGEST]

    def _repr_html_(self) -> str:
        return html_table(self.columns, self.rows, self.title)


class Brief:
    """What is long in a dataclass is summed up in its `repr`: give the dataclass `repr=False`."""

    def __repr__(self) -> str:
        assert is_dataclass(self)
        parts = [f"{f.name}={brief(getattr(self, f.name))}" for f in fields(self) if f.repr]
        text = f"{type(self).__name__}({', '.join(parts)})"
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ...)"


class Shown(Brief, ABC):
    """What has a table prints it, shows it in Jupyter, and gives it as a frame."""

    @abstractmethod
    def table(self) -> Table: ...

    def to_frame(self) -> "pandas.DataFrame":
        """The table as a frame of pandas; all rows, where a table shows the first ones."""
        return self.table().to_frame()

    @final
    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def brief(value: object) -> str:
    """A value in few words: of a tensor or an array its shape, of what is long its size."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{type(value).__name__}{list(shape)}"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:57]}...")
    if isinstance(value, Mapping):
        inner = [f"{brief(key)}: {brief(item)}" for key, item in value.items()] if len(value) <= _FEW else []
        return f"{{{', '.join(inner)}}}" if len(value) <= _FEW else f"<{len(value)} items>"
    if isinstance(value, tuple | list) and type(value).__repr__ in (tuple.__repr__, list.__repr__):
        if len(value) > _FEW:
            return f"<{len(value)} items>"
        text = ", ".join(map(brief, value))
        return f"[{text}]" if isinstance(value, list) else f"({text})"
    if is_dataclass(value) or isinstance(value, bool | int | float | None):
        return repr(value)
    text = repr(value)
    return text if len(text) <= 80 else f"<{type(value).__name__}>"


def html_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(text_of(cell))}</{tag}>" for cell in cells) + "</tr>"

    caption = f"<caption>{escape(title)}</caption>" if title else ""
    body = "".join(line(row, "td") for row in rows)
    return f"<table>{caption}<thead>{line(columns, 'th')}</thead><tbody>{body}</tbody></table>"


def text_of(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else printable(str(cell))
