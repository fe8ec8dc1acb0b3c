"""Plotly figures of what was measured: numbers go in, a figure comes out, readable on light and on dark paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probes.figures.style import (
    BLUE,
    CYCLE,
    DASHES,
    DIVERGING,
    GREY,
    GRID,
    PINK,
    Number,
    Range,
    blank,
    dress,
    error_bars,
    escaped,
    mark_of,
    see_through,
    settled,
)
from probes.late import go, subplots


@dataclass(frozen=True)
class Point:
    """One arm in the plane: its mean thinking tokens, its accuracy, and the accuracy's interval.

    `accuracy` and its `interval` are shares in [0, 1]; None where a number is not known.

    >>> from probes.figures import Point
    >>> Point("plain", length=12.1, accuracy=0.58, interval=(0.55, 0.61))
    Point(name='plain', length=12.1, accuracy=0.58, interval=(0.55, 0.61), group='all problems')
    """

    name: str
    length: Number
    accuracy: Number
    interval: Range
    group: str = "all problems"


@dataclass(frozen=True)
class Dose:
    """What one strength did: means, and their intervals.

    Lengths are thinking tokens; accuracy and truncation shares in [0, 1]. None where a number is not known.

    >>> from probes.figures import Dose
    >>> dose = Dose(2, 14.2, length_interval=(13.6, 14.8), accuracy=0.71, accuracy_interval=(0.66, 0.76), truncation=0)
    >>> dose.strength, dose.length, dose.accuracy
    (2, 14.2, 0.71)
    """

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
    title: str = "",
) -> "go.Figure":
    """Held-out AUROC layer by layer, over what shuffled labels and random directions reach, beside the confounds.

    >>> from probes.figures import evidence_figure
    >>> figure = evidence_figure(
    ...     [0, 1], [0.7, 0.9], null=[(0.3, 0.7), (0.4, 0.6)], confounds={"span length": [0.6, 0.6]}
    ... )
    >>> [trace.name for trace in figure.data]
    ['shuffled labels', 'span length', 'direction']
    """
    figure = blank("layer", "held-out AUROC", title=title)
    for band, name, colour in ((null, "shuffled labels", PINK), (random, "random directions", GREY)):
        if band:
            _add_band(figure, layers, band, name, colour)
    for i, (name, values) in enumerate((confounds or {}).items()):
        style = {
            "color": CYCLE[(i + 2) % len(CYCLE)],
            "width": 1.5,
            "dash": DASHES[(i + i // len(CYCLE)) % len(DASHES)],
        }
        figure.add_scatter(x=list(layers), y=list(values), name=escaped(name), mode="lines", line=style)
    figure.add_scatter(
        x=list(layers), y=list(auroc), name="direction", mode="lines+markers", line={"color": BLUE, "width": 3}
    )
    figure.update_layout(xaxis={"dtick": max(1, len(layers) // 16)})
    return settled(figure)


def heads_figure(
    scores: Sequence[Sequence[Number]], *, edited: Sequence[Sequence[int]] = (), title: str = ""
) -> "go.Figure":
    """One cell a head, layers downwards; orange is positive, blue negative, and the edited heads are outlined.

    `scores` are `[n_layers, n_heads]`, `edited` pairs of layer and head.

    >>> from probes.figures import heads_figure
    >>> figure = heads_figure([[0.1, -0.4], [0.7, None]], edited=[(1, 0)])
    >>> figure.data[0].zmin, figure.data[0].zmax, len(figure.layout.shapes)
    (-0.7, 0.7, 1)
    """
    largest = max((abs(score) for row in scores for score in row if score is not None), default=0.0) or 1.0
    figure = blank("head", "layer", title=title)
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


def arms_figure(points: Sequence[Point], *, title: str = "") -> "go.Figure":
    """Accuracy against thinking length, with the accuracy's interval: a colour an arm, filled for the first group.

    A line joins the first group's Pareto front: the arms that no other beats in both.

    >>> from probes.figures import Point, arms_figure
    >>> points = [Point("plain", 12.1, 0.58, (0.55, 0.61)), Point("edited", 15.8, 0.80, (0.77, 0.82))]
    >>> [trace.name for trace in arms_figure(points).data]
    ['plain', 'edited', 'Pareto front']
    """
    names, groups = (list(dict.fromkeys(getattr(p, field) for p in points)) for field in ("name", "group"))
    marks = ", ".join(f"{kind}: {escaped(group)}" for kind, group in zip(("filled", "open"), groups, strict=False))
    figure = blank(f"mean thinking tokens ({marks})", "accuracy", title=title)
    for group in groups:
        for i, name in enumerate(names):
            selected = [p for p in points if (p.name, p.group) == (name, group)]
            mark = mark_of(i)
            symbol = mark["symbol"] + ("" if group == groups[0] else "-open")
            figure.add_scatter(
                x=[p.length for p in selected],
                y=[p.accuracy for p in selected],
                error_y=error_bars([p.accuracy for p in selected], [p.interval for p in selected]),
                name=escaped(name),
                legendgroup=escaped(name),
                showlegend=group == groups[0],
                mode="markers",
                marker={**mark, "symbol": symbol, "size": 20 - 1.6 * (i % 8)},
                opacity=0.85,
                hovertemplate="%{y:.3f} at %{x:.2f} tokens",
            )
    front = pareto_front([p for p in points if p.group == groups[0]]) if points else []
    if len(front) > 1:
        line = {"color": GREY, "width": 1, "dash": "dot"}
        x, y = [p.length for p in front], [p.accuracy for p in front]
        figure.add_scatter(x=x, y=y, mode="lines", line=line, name="Pareto front", hoverinfo="skip")
    figure.update_layout(height=430)
    return settled(figure)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that none is both as short and more accurate, or shorter and as accurate as; from short to long.

    Points with an unknown number are left out.

    >>> from probes.figures import Point, pareto_front
    >>> arms = {"plain": (12.1, 0.58), "edited": (15.8, 0.80), "verbose": (30.0, 0.75)}
    >>> points = [Point(name, length, accuracy, (None, None)) for name, (length, accuracy) in arms.items()]
    >>> [point.name for point in pareto_front(points)]
    ['plain', 'edited']
    """
    front: list[Point] = []
    known = [p for p in points if p.length is not None and p.accuracy is not None]
    for point in sorted(known, key=lambda p: (p.length, -(p.accuracy or 0))):
        if not front or (point.accuracy or 0) > (front[-1].accuracy or 0):
            front.append(point)
    return front


def grids_figure(
    grids: Mapping[str, Sequence[Sequence[Number]]], *, down: Sequence[str], across: Sequence[str], title: str = ""
) -> "go.Figure":
    """Heatmaps side by side, with the same rows and columns. The first holds sizes, the others cosines.

    >>> from probes.figures import grids_figure
    >>> grids = {"norm": [[1.2, 0.4]], "cosine": [[0.9, -0.1]]}
    >>> figure = grids_figure(grids, down=["o_proj"], across=["0", "1"])
    >>> [(grid.zmin, grid.zmax) for grid in figure.data]
    [(0, None), (-1, 1)]
    """
    figure = subplots.make_subplots(
        rows=1, cols=len(grids), shared_yaxes=True, horizontal_spacing=0.08, subplot_titles=[escaped(g) for g in grids]
    )
    dress(figure, title)
    for i, (name, values) in enumerate(grids.items()):
        sizes = {"colorscale": [[0, see_through(BLUE, 0.06)], [1, BLUE]], "zmin": 0}
        signed = {"colorscale": [list(stop) for stop in DIVERGING], "zmin": -1, "zmax": 1}
        place = sum(figure.layout[f"xaxis{i + 1 if i else ''}"].domain) / 2
        bar = {"orientation": "h", "thickness": 10, "outlinewidth": 0, "x": place, "y": 0, "ypad": 64, "yanchor": "top"}
        figure.add_heatmap(
            z=[list(row) for row in values],
            x=list(across),
            y=list(down),
            colorbar={**bar, "len": 0.8 / len(grids), "nticks": 4},
            hovertemplate=f"{escaped(name)}, layer %{{x}}, %{{y}}: %{{z:.4g}}<extra></extra>",
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
) -> "go.Figure":
    """Thinking tokens and accuracy against strength: along the direction, and along random ones of its norm.

    >>> from probes.figures import Dose, sweep_figure
    >>> doses = [Dose(x, 12 + 4 * x, (11 + 4 * x, 13 + 4 * x), 0.6, (0.5, 0.7), 0.0) for x in (-1.0, 0.0, 1.0)]
    >>> figure = sweep_figure(doses, random=[])
    >>> [(trace.name, trace.y) for trace in figure.data]
    [('length direction', (8.0, 12.0, 16.0)), ('length direction', (0.6, 0.6, 0.6))]
    """
    figure = subplots.make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    dress(figure, title)
    series = ((random, "random directions, same norm", GREY, "dash"), (direction, name, BLUE, "solid"))
    for doses, name, colour, dash in series if random else series[1:]:
        x = [dose.strength for dose in doses]
        style: dict[str, Any] = {
            "name": name,
            "legendgroup": name,
            "line": {"color": colour, "dash": dash, "width": 2.5},
        }
        lengths, rates = [d.length for d in doses], [d.accuracy for d in doses]
        errors = error_bars(lengths, [d.length_interval for d in doses])
        cut = [d.truncation for d in doses]
        hover = "%{y:.3g} at %{x}, truncated %{customdata:.1%}"
        figure.add_scatter(x=x, y=lengths, error_y=errors, customdata=cut, hovertemplate=hover, row=1, col=1, **style)
        errors = error_bars(rates, [d.accuracy_interval for d in doses])
        style["showlegend"] = False
        figure.add_scatter(x=x, y=rates, error_y=errors, customdata=cut, hovertemplate=hover, row=1, col=2, **style)
    figure.update_xaxes(title_text="strength", gridcolor=GRID, zerolinecolor=GRID)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=GRID, rangemode="tozero")
    figure.update_yaxes(title_text="mean thinking tokens", row=1, col=1)
    figure.update_yaxes(title_text="accuracy", row=1, col=2)
    return figure


def _add_band(figure: "go.Figure", x: Sequence[int], band: Sequence[Range], name: str, colour: str) -> None:
    """A filled outline: up along the upper bounds, back along the lower ones."""
    around = [*x, *reversed(x)]
    outline = [*(high for _, high in band), *(low for low, _ in reversed(band))]
    line = {"color": see_through(colour, 0.5), "width": 1}
    filled = {"fill": "toself", "fillcolor": see_through(colour, 0.22), "line": line}
    figure.add_scatter(x=around, y=outline, name=name, mode="lines", hoverinfo="skip", **filled)
