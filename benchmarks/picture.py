"""Accuracy against thinking tokens: every arm of the reasoner's tables on counts and money, read out of RESULTS.md.

    python benchmarks/picture.py [-o docs/reasoner.png]

A dot is an arm, a colour and a mark its table; a null is hollow. Bars are 95 % intervals: of the thinking tokens, and
of the difference in accuracy from the plain model of the same table, paired by problem. The line is the Pareto front of
all but the nulls; of its arms plain is named, and those whose interval leaves plain's accuracy out.
Needs a browser to write PNG; an output that ends in .html needs none.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from devtools import BROWSERS

from probes.figures import Point, pareto_front
from probes.figures.style import error_bars

HERE = Path(__file__).parent
TABLES = {  # headings of RESULTS.md, and how the picture calls them
    "Again, with erasures of the same size": "ThinkEdit",
    "ThinkEdit's α on the reasoner": "ThinkEdit's α",
    "Length steering on the reasoner": "length direction",
    "The cue's direction on the reasoner": "cue direction",
    "Efficiency steering on the reasoner": "efficiency steering",
    "SEAL on the reasoner": "SEAL",
    "Behaviour vectors on the reasoner": "behaviour vectors",
    "Representation engineering on the reasoner": "representation engineering",
    "The dial of thinking length on the reasoner": "reasoning vector, dialled",
    "Decoding and prompts on the reasoner": "decoding and prompts",
    "Holding the reasoner's thinking at a length": "closed loop",
}
MARKS = (
    "circle",
    "diamond",
    "square",
    "cross",
    "triangle-up",
    "x",
    "star",
    "hexagon",
    "triangle-down",
    "bowtie",
    "pentagon",
)
COLOURS = (
    "#3d85c6", "#d98324", "#2f9e6e", "#d6456f", "#9a6ad6", "#b59b1e", "#20a0a8", "#8c564b", "#1f3f94", "#e07bd0",
    "#6b8e23",
)  # fmt: skip
NUMBER = r"([−+]?[\d.]+)"
RANGE = re.compile(rf"{NUMBER} \[{NUMBER}, {NUMBER}\]")


@dataclass(frozen=True)
class Dot:
    """An arm of a table, with the intervals of its accuracy and of its thinking tokens."""

    table: str
    point: Point
    tokens: tuple[float, float]
    differs: bool


def dots(text: str) -> Iterator[Dot]:
    """The rows of the tables above whose columns are arm, accuracy, against plain, thinking tokens."""
    for section in re.split(r"^##+ ", text, flags=re.MULTILINE):
        heading, _, body = section.partition("\n")
        if heading not in TABLES:
            continue
        for line in body.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) < 4 or not re.fullmatch(r"\d?\.\d+", cells[1]) or not RANGE.fullmatch(cells[3]):
                continue
            accuracy, (length, *tokens) = float(cells[1]), _numbers(cells[3])
            gain, low, high = _numbers(cells[2]) if cells[2] else (0.0, 0.0, 0.0)
            point = Point(cells[0], length, accuracy, (max(0.0, accuracy - gain + low), accuracy - gain + high))
            yield Dot(TABLES[heading], point, (tokens[0], tokens[1]), differs=low > 0 or high < 0)


def _numbers(cell: str) -> tuple[float, ...]:
    found = RANGE.fullmatch(cell)
    assert found, cell
    return tuple(float(number.replace("−", "-")) for number in found.groups())


def figure(every: list[Dot]) -> go.Figure:
    drawn = go.Figure()
    plain = [dot for dot in every if dot.point.name == "plain"]
    arms = [dot for dot in every if dot.point.name != "plain"]
    tables = list(dict.fromkeys(dot.table for dot in arms))
    for i, table in enumerate(tables):
        inside = [dot for dot in arms if dot.table == table]
        _scatter(drawn, [dot for dot in inside if not _is_null(dot)], table, COLOURS[i], MARKS[i])
        _scatter(drawn, [dot for dot in inside if _is_null(dot)], table, COLOURS[i], f"{MARKS[i]}-open")
    _scatter(drawn, plain[:1], "plain", "#000000", "circle-open", 15)
    front = pareto_front([dot.point for dot in [*plain[:1], *arms] if not _is_null(dot)])
    drawn.add_scatter(
        x=[p.length for p in front], y=[p.accuracy for p in front], mode="lines", name="Pareto front",
        line={"color": "#555555", "width": 1, "dash": "dot"},
    )  # fmt: skip
    tables_of = {id(dot.point): f"{dot.table}: " for dot in arms if dot.differs}
    told = [p for p in front if p.name == "plain" or id(p) in tables_of]
    named = [f"{i}  {tables_of.get(id(p), '')}{p.name}" for i, p in enumerate(told, 1)]
    for i, p in enumerate(told, 1):
        drawn.add_annotation(
            x=p.length, y=p.accuracy, text=str(i), font={"size": 12, "color": "#222222"}, ax=-9 - 9 * (i % 2),
            ay=-14 - 12 * (i % 2), arrowwidth=0.7, arrowcolor="#999999",
        )  # fmt: skip
    drawn.add_annotation(
        x=1.02, y=0.02, xref="paper", yref="paper", xanchor="left", yanchor="bottom", align="left", showarrow=False,
        text="<br>".join(["on the front, and not as plain is:", *map(escape, named)]), font={"size": 11},
    )  # fmt: skip
    drawn.update_layout(
        template="plotly_white", width=1180, height=760, font={"family": "system-ui, sans-serif", "size": 13},
        legend={"x": 1.01, "y": 1}, margin={"l": 64, "r": 330, "t": 24, "b": 56},
    )  # fmt: skip
    drawn.update_xaxes(title_text="mean thinking tokens", rangemode="tozero")
    drawn.update_yaxes(title_text="accuracy", rangemode="tozero")
    return drawn


def _is_null(dot: Dot) -> bool:
    return any(word in dot.point.name for word in ("random", "shuffled", "lowest", "noise"))


def _scatter(drawn: go.Figure, which: list[Dot], name: str, colour: str, mark: str, size: int = 9) -> None:
    x, y = [dot.point.length for dot in which], [dot.point.accuracy for dot in which]

    def bars(values: list, ranges: list) -> dict:
        return error_bars(values, ranges) | {"thickness": 0.7, "width": 0}

    drawn.add_scatter(
        x=x, y=y, mode="markers", name=name, legendgroup=name,
        showlegend=mark in MARKS or size > 9, text=[dot.point.name for dot in which],
        error_x=bars(x, [dot.tokens for dot in which]), error_y=bars(y, [dot.point.interval for dot in which]),
        marker={"color": colour, "symbol": mark, "size": size, "line": {"width": 1.5 if size > 9 else 0.5}},
        hovertemplate="%{text}: %{y:.3f} at %{x:.1f} tokens",
    )  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("-o", "--output", type=Path, default=HERE.parent / "docs" / "reasoner.png")
    output = words.parse_args().output
    drawn = figure(list(dots((HERE / "RESULTS.md").read_text())))
    if output.suffix == ".html":
        drawn.write_html(output)
        return
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit("There is no browser to draw with: install chromium, or name an output that ends in .html.")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "picture.html"
        drawn.write_html(page, config={"displayModeBar": False})
        page.write_text(page.read_text().replace("<body>", '<body style="margin:0">'))
        size = f"--window-size={drawn.layout.width},{drawn.layout.height}"
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000", size)
        subprocess.run(
            [browser, *flags, f"--screenshot={output.resolve()}", page.as_uri()], check=True, capture_output=True
        )


if __name__ == "__main__":
    main()
