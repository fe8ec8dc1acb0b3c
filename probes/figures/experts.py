"""Figures of a Mixture of Experts: which experts are used and scored where, along a chain, and against a strength."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from probes.figures.plots import Dose
from probes.figures.style import (
    BLUE,
    CYCLE,
    DASHES,
    DIVERGING,
    GREY,
    GRID,
    PINK,
    Number,
    blank,
    dress,
    error_bars,
    escaped,
    see_through,
    settled,
)
from probes.late import go, subplots
from probes.model.routers import Expert

Grid = Sequence[Sequence[Number]] | Float[np.ndarray, "rows columns"] | Float[Tensor, "rows columns"]
_LOAD = [[0, see_through(BLUE, 0.06)], [1, BLUE]]


def scores_figure(
    scores: Mapping[str, Grid], layers: Sequence[int], *, outlined: Sequence[Expert] = (), title: str = ""
) -> "go.Figure":
    """Grids of one number for each expert, layers downwards, one grid above the other: nPMI by marker, or a score.

    Orange is positive, blue negative, on one scale; `outlined` experts are outlined. NaN leaves a cell empty. A grid
    is `[layers, n_experts]`.

    >>> from probes.figures import scores_figure
    >>> figure = scores_figure({"Wait": [[0.1, -0.3], [float("nan"), 0.2]]}, layers=[3, 7], outlined=[(3, 1)])
    >>> figure.data[0].y, figure.layout.coloraxis.cmax
    (('3', '7'), 0.3)
    """
    largest = max((float(np.nanmax(np.abs(_array(grid)))) for grid in scores.values()), default=0.0) or 1.0
    return _grids(scores, layers, [list(stop) for stop in DIVERGING], (-largest, largest), outlined, title)


def loads_figure(
    loads: Mapping[str, Grid], layers: Sequence[int], *, outlined: Sequence[Expert] = (), title: str = ""
) -> "go.Figure":
    """Grids of the share of tokens that choose each expert, layers downwards: one for each phase, on one scale.

    A grid is `[layers, n_experts]`, of shares in [0, 1].

    >>> from probes.figures import loads_figure
    >>> figure = loads_figure({"prompt": [[0.5, 0.5]], "thinking": [[0.9, 0.1]]}, layers=[3])
    >>> len(figure.data), figure.layout.coloraxis.cmax
    (2, 0.9)
    """
    largest = max((float(np.nanmax(_array(grid))) for grid in loads.values()), default=1.0)
    return _grids(loads, layers, _LOAD, (0.0, largest), outlined, title)


def usage_figure(
    weights: Grid, experts: Sequence[str], tokens: Sequence[str], *, marked: Sequence[int] = (), title: str = ""
) -> "go.Figure":
    """The routing weight of some experts (rows) at each token of one chain (columns); lines stand at `marked` places,
    such as the delimiters of the thinking.

    >>> from probes.figures import usage_figure
    >>> figure = usage_figure([[0.0, 0.6, 0.2], [0.5, 0.0, 0.1]], ["L3E1", "L7E0"], ["a", "<think>", "So"], marked=[1])
    >>> figure.data[0].y, len(figure.layout.shapes)
    (('L3E1', 'L7E0'), 1)
    """
    figure = blank("token", "expert", title=title)
    figure.add_heatmap(
        z=_array(weights).tolist(),
        y=list(experts),
        colorscale=_LOAD,
        zmin=0,
        customdata=[[escaped(token) for token in tokens] for _ in experts],
        hovertemplate="%{y} at %{customdata}: %{z:.3g}<extra></extra>",
        colorbar={"thickness": 12, "outlinewidth": 0},
        xgap=1,
        ygap=1,
    )
    for at in marked:
        figure.add_vline(x=at - 0.5, line={"color": PINK, "width": 2})
    figure.update_xaxes(
        tickvals=list(range(len(tokens))), ticktext=[escaped(token) for token in tokens], showgrid=False, tickangle=-90
    )
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, automargin=True)
    figure.update_layout(height=min(900, 180 + 22 * len(experts)), margin={"b": 90, "t": 48 if title else 16})
    return figure


def doses_figure(series: Mapping[str, Sequence[Dose]], *, plain: Dose | None = None, title: str = "") -> "go.Figure":
    """Thinking tokens and accuracy against strength, which doubles from tick to tick; one line for each name.

    `plain` is the model with nothing done, drawn across.

    >>> from probes.figures import Dose, doses_figure
    >>> doses = [Dose(x, 12 + x, (11 + x, 13 + x), 0.6, (0.5, 0.7), 0.0) for x in (1.0, 2.0, 4.0)]
    >>> figure = doses_figure({"reinforced": doses})
    >>> figure.layout.xaxis.type, figure.layout.xaxis.ticktext
    ('log', ('1', '2', '4'))
    """
    figure = subplots.make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    dress(figure, title)
    for i, (name, doses) in enumerate(series.items()):
        found = sorted(doses, key=lambda dose: dose.strength)
        dash = "solid" if i == 0 else DASHES[(i - 1) % len(DASHES)]
        style: dict[str, Any] = {
            "name": escaped(name), "legendgroup": escaped(name), "mode": "lines+markers",
            "x": [d.strength for d in found], "customdata": [d.truncation for d in found],
            "hovertemplate": "%{y:.3g} at %{x}, truncated %{customdata:.1%}",
            "line": {"color": CYCLE[i % len(CYCLE)], "dash": dash, "width": 2.5},
        }  # fmt: skip
        lengths, rates = [d.length for d in found], [d.accuracy for d in found]
        errors = error_bars(lengths, [d.length_interval for d in found])
        figure.add_scatter(y=lengths, error_y=errors, row=1, col=1, **style)
        errors = error_bars(rates, [d.accuracy_interval for d in found])
        figure.add_scatter(y=rates, error_y=errors, showlegend=False, row=1, col=2, **style)
    if plain is not None:
        for column, value in enumerate((plain.length, plain.accuracy), start=1):
            figure.add_hline(y=value, line={"color": GREY, "dash": "dot", "width": 1.5}, row=1, col=column)
    ticks = sorted({dose.strength for doses in series.values() for dose in doses})
    figure.update_xaxes(
        type="log", title_text="strength", gridcolor=GRID, tickvals=ticks, ticktext=[f"{x:g}" for x in ticks]
    )
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=GRID, rangemode="tozero")
    figure.update_yaxes(title_text="mean thinking tokens", row=1, col=1)
    figure.update_yaxes(title_text="accuracy", row=1, col=2)
    return settled(figure)


def _grids(
    grids: Mapping[str, Grid],
    layers: Sequence[int],
    scale: list[Any],
    limits: tuple[float, float],
    outlined: Sequence[Expert],
    title: str,
) -> "go.Figure":
    figure = subplots.make_subplots(
        rows=len(grids), cols=1, shared_xaxes=True, vertical_spacing=0.3 / (len(grids) + 1),
        subplot_titles=[escaped(name) for name in grids],
    )  # fmt: skip
    dress(figure, title)
    for row, (name, grid) in enumerate(grids.items(), start=1):
        figure.add_heatmap(
            z=[[None if np.isnan(x) else x for x in line] for line in _array(grid).tolist()],
            y=[str(layer) for layer in layers],
            coloraxis="coloraxis",
            hovertemplate=f"{escaped(name)}, L%{{y}}E%{{x}}: %{{z:.4g}}<extra></extra>",
            xgap=1,
            ygap=1,
            row=row,
            col=1,
        )
        for layer, expert in outlined:
            at = list(layers).index(layer)
            box = {"x0": expert - 0.5, "x1": expert + 0.5, "y0": at - 0.5, "y1": at + 0.5}
            figure.add_shape(type="rect", line={"color": PINK, "width": 3}, row=row, col=1, **box)
    bar = {"thickness": 12, "outlinewidth": 0, "tickformat": ".2~g"}
    figure.update_layout(
        coloraxis={"colorscale": scale, "cmin": limits[0], "cmax": limits[1], "colorbar": bar},
        height=min(1200, 110 + len(grids) * (60 + 24 * len(layers))),
        margin={"t": 64 if title else 40},
    )
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_xaxes(title_text="expert", row=len(grids), col=1)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, title_text="layer")
    return figure


def _array(grid: Grid) -> Float[np.ndarray, "rows columns"]:
    return np.asarray(grid, dtype=float)
