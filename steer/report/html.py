"""The parts of a page: text, numbers, tables, figures and coloured tokens, as HTML in which all text is escaped."""

from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from math import isnan
from typing import Any, TypeGuard

from probes.late import go, offline

_WATCH = """document.documentElement.dataset.errors = 0;
for (const kind of ["error", "unhandledrejection", "securitypolicyviolation"])
  addEventListener(kind, () => document.documentElement.dataset.errors++, true);"""
_DRAW = """for (const plot of document.querySelectorAll(".plot")) {
  const figure = JSON.parse(plot.nextElementSibling.textContent);
  Plotly.newPlot(plot, figure.data, figure.layout, {responsive: true, displayModeBar: false});
}"""


def page(title: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole HTML file of sections (anchor, heading, body) that fetches nothing and counts its own errors."""
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in sections)
    bodies = "".join(f'<section id="{key}"><h2>{escape(name)}</h2>{body}</section>' for key, name, body in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_style()}</style><script>{_WATCH}</script><script>{offline.get_plotlyjs()}</script></head><body>"
        f"<header><h1>{escape(title)}</h1></header><nav>{links}</nav><main>{bodies}</main>"
        "<footer>Made with ThinkSteer. The figures need JavaScript; the tables do not.</footer>"
        f"<script>{_DRAW}</script></body></html>\n"
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def told(*verdicts: str) -> str:
    """What a picture says, in words."""
    return "".join(f'<p class="verdict">{escape(text)}</p>' for text in verdicts)


def made_by(command: str) -> str:
    """The command that made a section's numbers; what else made them is in the provenance."""
    return (
        f'<p class="soft made">made by <a href="#provenance"><code>{escape(command)}</code></a></p>' if command else ""
    )


def split_tag(name: str) -> str:
    return f'<span class="split">split: {escape(name)}</span>'


def folded_away(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, prose: bool = False) -> str:
    kind = ' class="words"' if prose else ""
    head = "".join(f"<th{kind}>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td{kind}>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def plot(figure: "go.Figure") -> str:
    """A figure's data, beside the place it is drawn at. Plotly leaves no `<` in it that could close the script."""
    height = int(figure.layout.height)
    data = f'<script type="application/json">{figure.to_json()}</script>'
    return f'<div class="plot" style="height:{height}px"></div>{data}'


def known(value: float | None) -> TypeGuard[float]:
    """Is it a number? What cannot be told is None or NaN."""
    return value is not None and not isnan(value)


def number(value: float | None, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if known(value) else "–"


def share(value: float | None) -> str:
    return f"{value:.1%}" if known(value) else "–"


def interval(pair: Sequence[float | None]) -> str:
    return f"[{number(pair[0])}, {number(pair[1])}]"


def signed(value: float, bounds: Sequence[float | None]) -> str:
    low, high = (f"{bound:+.3f}" if known(bound) else "–" for bound in bounds)
    return f"{value:+.3f} [{low}, {high}]".replace("-", "−")


def shade(value: float, scale: float) -> float:
    """How a token is coloured: -1 is the short class' mean and beyond, 1 the long class', 0 the midpoint."""
    return max(-1.0, min(1.0, value / scale)) if scale else 0.0


def token_span(token: str, value: float, scale: float, prompt: bool, read: bool) -> str:
    part = shade(value, scale)
    names = ["towards-long" if part >= 0 else "towards-short", *["prompt"] * prompt, *["read"] * read]
    text = escape(token.replace("\n", "↵\n"))
    return f'<i class="{" ".join(names)}" style="--shade:{abs(part):.3f}" title="{value:+.3f}">{text}</i>'


@cache
def colours() -> str:
    """The colours of every page, on light and on dark paper: rules of CSS."""
    return (files("steer.report") / "colours.css").read_text(encoding="utf-8")


@cache
def _style() -> str:
    return colours() + (files("steer.report") / "report.css").read_text(encoding="utf-8")


@cache
def _policy() -> str:
    """Nothing may be fetched, and no script may run but the page's own three, known by their checksums."""
    digests = (sha256(script.encode()).digest() for script in (_WATCH, offline.get_plotlyjs(), _DRAW))
    hashes = " ".join(f"'sha256-{b64encode(digest).decode()}'" for digest in digests)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
