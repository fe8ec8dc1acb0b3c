"""Plotly figures of what was measured: numbers go in, a figure comes out, readable on light and on dark paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

Number = float | int | None
Range = Sequence[Number]

BLUE, ORANGE, GREEN, PINK, VIOLET, GREY = "#3d85c6", "#d98324", "#2f9e6e", "#d6456f", "#9a6ad6", "#868686"
DIVERGING = ((0.0, "#1f66ad"), (0.25, "#7fb0df"), (0.5, "rgba(134,134,134,0.16)"), (0.75, "#e0a866"), (1.0, "#b8620c"))
_CYCLE = (BLUE, ORANGE, GREEN, PINK, VIOLET, "#b59b1e", "#20a0a8", GREY)
_SYMBOLS = ("circle", "diamond", "square", "cross", "triangle-up", "x", "star", "hexagon")
_DASHES = ("dot", "dash", "dashdot", "longdash", "longdashdot")
_LINE = "rgba(134,134,134,0.28)"


@dataclass(frozen=True)
class Point:
    """One arm in the plane: its mean thinking tokens, its accuracy, and the accuracy's interval."""

    name: str
    length: Number
    accuracy: Number
    interval: Range
    group: str = "all problems"


@dataclass(frozen=True)
class Dose:
    """What one strength did: means, and their intervals."""

    strength: float
    length: Number
    length_interval: Range
    accuracy: Number
    accuracy_interval: Range
    truncation: Number


def evidence_figure(
    layers: Sequence[int],
    auroc: Sequence[Number],
    *,
    null: Sequence[Range] = (),
    random: Sequence[Range] = (),
    confounds: Mapping[str, Sequence[Number]] | None = None,
) -> go.Figure:
    """Held-out AUROC layer by layer, over what shuffled labels and random directions reach, beside the confounds."""
    figure = _figure("layer", "held-out AUROC")
    for band, name, colour in ((null, "shuffled labels", PINK), (random, "random directions", GREY)):
        if band:
            _add_band(figure, layers, band, name, colour)
    for i, (name, values) in enumerate((confounds or {}).items()):
        style = {"color": _CYCLE[(i + 2) % len(_CYCLE)], "width": 1.5, "dash": _DASHES[i % len(_DASHES)]}
        figure.add_scatter(x=list(layers), y=list(values), name=_text(name), mode="lines", line=style)
    figure.add_scatter(
        x=list(layers), y=list(auroc), name="direction", mode="lines+markers", line={"color": BLUE, "width": 3}
    )
    figure.update_layout(xaxis={"dtick": max(1, len(layers) // 16)})
    return figure


def heads_figure(
    scores: Sequence[Sequence[Number]], *, edited: Sequence[Sequence[int]] = (), title: str = ""
) -> go.Figure:
    """One cell a head, layers downwards; orange is positive, blue negative, and the edited heads are outlined."""
    largest = max((abs(score) for row in scores for score in row if score is not None), default=0.0) or 1.0
    figure = _figure("head", "layer", title=title)
    figure.add_heatmap(
        z=[list(row) for row in scores],
        zmin=-largest,
        zmax=largest,
        colorscale=[list(stop) for stop in DIVERGING],
        hovertemplate="L%{y}H%{x}: %{z:.4g}<extra></extra>",
        colorbar={"thickness": 12, "outlinewidth": 0, "tickformat": ".2~g"},
        xgap=1,
        ygap=1,
    )
    for layer, head in edited:
        box = {"x0": head - 0.5, "x1": head + 0.5, "y0": layer - 0.5, "y1": layer + 0.5}
        figure.add_shape(type="rect", line={"color": PINK, "width": 3}, **box)
    ticks = {"dtick": max(1, len(scores) // 16), "showgrid": False, "zeroline": False, "autorange": "reversed"}
    across = {"dtick": max(1, len(scores[0]) // 16) if scores else 1, "showgrid": False, "zeroline": False}
    figure.update_layout(yaxis=ticks, xaxis=across, height=min(900, 130 + 34 * len(scores)), showlegend=False)
    figure.update_layout(margin={"t": 48 if title else 16})
    return figure


def arms_figure(points: Sequence[Point]) -> go.Figure:
    """Accuracy against thinking length, with the accuracy's interval: a colour an arm, filled for the first group.

    A line joins the first group's Pareto front: the arms that no other beats in both.
    """
    names, groups = (list(dict.fromkeys(getattr(p, field) for p in points)) for field in ("name", "group"))
    marks = ", ".join(f"{kind}: {_text(group)}" for kind, group in zip(("filled", "open"), groups, strict=False))
    figure = _figure(f"mean thinking tokens ({marks})", "accuracy")
    for group in groups:
        for i, name in enumerate(names):
            chosen = [p for p in points if (p.name, p.group) == (name, group)]
            symbol = _SYMBOLS[i % len(_SYMBOLS)] + ("" if group == groups[0] else "-open")
            figure.add_scatter(
                x=[p.length for p in chosen],
                y=[p.accuracy for p in chosen],
                error_y=_errors([p.accuracy for p in chosen], [p.interval for p in chosen]),
                name=_text(name),
                legendgroup=_text(name),
                showlegend=group == groups[0],
                mode="markers",
                marker={"color": _CYCLE[i % len(_CYCLE)], "symbol": symbol, "size": 20 - 1.6 * (i % 8)},
                opacity=0.85,
                hovertemplate="%{y:.3f} at %{x:.2f} tokens",
            )
    front = pareto_front([p for p in points if p.group == groups[0]]) if points else []
    if len(front) > 1:
        line = {"color": GREY, "width": 1, "dash": "dot"}
        x, y = [p.length for p in front], [p.accuracy for p in front]
        figure.add_scatter(x=x, y=y, mode="lines", line=line, name="Pareto front", hoverinfo="skip")
    figure.update_layout(height=430)
    return figure


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that none is both as short and more accurate, or shorter and as accurate as; from short to long."""
    front: list[Point] = []
    known = [p for p in points if p.length is not None and p.accuracy is not None]
    for point in sorted(known, key=lambda p: (p.length, -(p.accuracy or 0))):
        if not front or (point.accuracy or 0) > (front[-1].accuracy or 0):
            front.append(point)
    return front


def grids_figure(
    grids: Mapping[str, Sequence[Sequence[Number]]], *, down: Sequence[str], across: Sequence[str]
) -> go.Figure:
    """Heatmaps side by side, with the same rows and columns. The first holds sizes, the others cosines."""
    figure = make_subplots(
        rows=1, cols=len(grids), shared_yaxes=True, horizontal_spacing=0.08, subplot_titles=[_text(g) for g in grids]
    )
    _dress(figure, "")
    for i, (name, values) in enumerate(grids.items()):
        sizes = {"colorscale": [[0, _clear(BLUE, 0.06)], [1, BLUE]], "zmin": 0}
        signed = {"colorscale": [list(stop) for stop in DIVERGING], "zmin": -1, "zmax": 1}
        place = sum(figure.layout[f"xaxis{i + 1 if i else ''}"].domain) / 2
        bar = {"orientation": "h", "thickness": 10, "outlinewidth": 0, "x": place, "y": 0, "ypad": 64, "yanchor": "top"}
        figure.add_heatmap(
            z=[list(row) for row in values],
            x=list(across),
            y=list(down),
            colorbar={**bar, "len": 0.8 / len(grids), "nticks": 4},
            hovertemplate=f"{_text(name)}, layer %{{x}}, %{{y}}: %{{z:.4g}}<extra></extra>",
            xgap=1,
            ygap=1,
            row=1,
            col=i + 1,
            **(signed if i else sizes),
        )
    figure.update_xaxes(type="category", showgrid=False, title_text="layer", title_standoff=6)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed", automargin=True)
    figure.update_layout(height=min(900, 200 + 30 * len(down)), margin={"b": 130})
    return figure


def sweep_figure(
    direction: Sequence[Dose], random: Sequence[Dose], *, name: str = "length direction", title: str = ""
) -> go.Figure:
    """Thinking tokens and accuracy against strength: along the direction, and along random ones of its norm."""
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    _dress(figure, title)
    series = ((random, "random directions, same norm", GREY, "dash"), (direction, name, BLUE, "solid"))
    for doses, name, colour, dash in series if random else series[1:]:
        x = [dose.strength for dose in doses]
        style: dict[str, Any] = {
            "name": name,
            "legendgroup": name,
            "line": {"color": colour, "dash": dash, "width": 2.5},
        }
        lengths, rates = [d.length for d in doses], [d.accuracy for d in doses]
        errors = _errors(lengths, [d.length_interval for d in doses])
        cut = [d.truncation for d in doses]
        hover = "%{y:.3g} at %{x}, truncated %{customdata:.1%}"
        figure.add_scatter(x=x, y=lengths, error_y=errors, customdata=cut, hovertemplate=hover, row=1, col=1, **style)
        errors = _errors(rates, [d.accuracy_interval for d in doses])
        style["showlegend"] = False
        figure.add_scatter(x=x, y=rates, error_y=errors, customdata=cut, hovertemplate=hover, row=1, col=2, **style)
    figure.update_xaxes(title_text="strength", gridcolor=_LINE, zerolinecolor=_LINE)
    figure.update_yaxes(gridcolor=_LINE, zerolinecolor=_LINE, rangemode="tozero")
    figure.update_yaxes(title_text="mean thinking tokens", row=1, col=1)
    figure.update_yaxes(title_text="accuracy", row=1, col=2)
    return figure


def _figure(x: str, y: str, *, title: str = "") -> go.Figure:
    figure = go.Figure()
    _dress(figure, title)
    for axes, name in ((figure.update_xaxes, x), (figure.update_yaxes, y)):
        axes(title_text=name, gridcolor=_LINE, zerolinecolor=_LINE)
    return figure


def _dress(figure: go.Figure, title: str) -> None:
    """No paper and no template: mid-grey words, which read on white and on black."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "size": 13, "family": "system-ui, sans-serif"},
        margin={"l": 64, "r": 24, "t": 48, "b": 56},
        height=380,
        title={"text": _text(title), "font": {"size": 14}, "x": 0, "xref": "paper", "yref": "container", "y": 0.98},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"font": {"color": "#ffffff"}, "bgcolor": "#3a3f46"},
    )


def _add_band(figure: go.Figure, x: Sequence[int], band: Sequence[Range], name: str, colour: str) -> None:
    """A filled outline: up along the upper bounds, back along the lower ones."""
    around = [*x, *reversed(x)]
    outline = [*(high for _, high in band), *(low for low, _ in reversed(band))]
    filled = {"fill": "toself", "fillcolor": _clear(colour, 0.22), "line": {"color": _clear(colour, 0.5), "width": 1}}
    figure.add_scatter(x=around, y=outline, name=name, mode="lines", hoverinfo="skip", **filled)


def _errors(values: Sequence[Number], intervals: Sequence[Range]) -> dict[str, Any]:
    """Plotly's two-sided error bars; none where an interval is not known."""
    pairs = [(v, low, high) for v, (low, high) in zip(values, intervals, strict=True)]
    whole = [(v, low, high) if None not in (v, low, high) else (0, 0, 0) for v, low, high in pairs]
    above, below = [high - v for v, _, high in whole], [v - low for v, low, _ in whole]  # type: ignore[operator]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.2, "width": 3}


def _clear(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _text(words: str) -> str:
    """Plotly reads text as HTML."""
    return escape(words, quote=False)
