"""How figures are drawn: colours, axes and error bars that read on light and on dark paper."""

from collections.abc import Sequence
from html import escape
from typing import Any

from probes.late import go

Number = float | int | None
Range = Sequence[Number]

BLUE, ORANGE, GREEN, PINK, VIOLET, GREY = "#3d85c6", "#d98324", "#2f9e6e", "#d6456f", "#9a6ad6", "#868686"
DIVERGING = ((0.0, "#1f66ad"), (0.25, "#7fb0df"), (0.5, "rgba(134,134,134,0.16)"), (0.75, "#e0a866"), (1.0, "#b8620c"))
CYCLE = (BLUE, ORANGE, GREEN, PINK, VIOLET, "#b59b1e", "#20a0a8", GREY)
SYMBOLS = ("circle", "diamond", "square", "cross", "triangle-up", "x", "star", "hexagon")
DASHES = ("dot", "dash", "dashdot", "longdash", "longdashdot")
_LEGEND = 100  # letters that one line of it holds at 900 pixels
GRID = "rgba(134,134,134,0.28)"


def blank(x: str, y: str, *, title: str = "") -> "go.Figure":
    figure = go.Figure()
    dress(figure, title)
    for axes, name in ((figure.update_xaxes, x), (figure.update_yaxes, y)):
        axes(title_text=name, gridcolor=GRID, zerolinecolor=GRID)
    return figure


def dress(figure: "go.Figure", title: str) -> None:
    """No paper and no template: mid-grey words, which read on white and on black."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "size": 13, "family": "system-ui, sans-serif"},
        margin={"l": 64, "r": 24, "t": 48, "b": 56},
        height=380,
        title={"text": escaped(title), "font": {"size": 14}, "x": 0, "xref": "paper", "yref": "container", "y": 0.98},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"font": {"color": "#ffffff"}, "bgcolor": "#3a3f46"},
        modebar={"orientation": "v", "bgcolor": "rgba(0,0,0,0)", "color": see_through(GREY, 0.5)},
    )


def line_of(i: int) -> dict[str, Any]:
    """The colour and the dash of line `i`: no two of 48 are alike."""
    return {"color": CYCLE[i % len(CYCLE)], "dash": ("solid", *DASHES)[i // len(CYCLE) % (len(DASHES) + 1)]}


def mark_of(i: int) -> dict[str, Any]:
    """The colour and the symbol of arm `i`: no two of 64 are alike."""
    return {"color": CYCLE[i % len(CYCLE)], "symbol": SYMBOLS[(i + i // len(CYCLE)) % len(SYMBOLS)]}


def settled(figure: "go.Figure") -> "go.Figure":
    """The same, its legend to the right where it would take more than a line above the plot."""
    named = {trace.legendgroup or i: trace.name for i, trace in enumerate(figure.data) if trace.showlegend is not False}
    if sum(len(str(name)) + 6 for name in named.values()) > _LEGEND:
        height = max(figure.layout.height, 26 * len(named) + 110)
        beside = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}
        figure.update_layout(legend=beside, height=height)
    return figure


def error_bars(values: Sequence[Number], intervals: Sequence[Range]) -> dict[str, Any]:
    """Plotly's two-sided error bars; none where an interval is not known."""
    whole = [
        (0.0, 0.0, 0.0) if v is None or low is None or high is None else (v, low, high)
        for v, (low, high) in zip(values, intervals, strict=True)
    ]
    above, below = [high - v for v, _, high in whole], [v - low for v, low, _ in whole]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.2, "width": 3}


def see_through(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def escaped(words: str) -> str:
    """Plotly reads text as HTML."""
    return escape(words, quote=False)
