"""Figures of causes: what layers would say, what patching restores, and which parts work together."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from probes.figures.experts import Grid
from probes.figures.style import BLUE, DIVERGING, PINK, blank, escaped, see_through
from probes.late import go

_SHARES = [[0, see_through(BLUE, 0.06)], [1, BLUE]]


def lens_figure(
    probability: Grid,
    top: Sequence[Sequence[str]],
    sites: Sequence[str],
    tokens: Sequence[str],
    *,
    title: str = "",
) -> "go.Figure":
    """The most likely next token at each site (rows, the last on top) after each token, and its probability.

    `probability` and `top` are `[sites, pos]`.

    >>> from probes.figures import lens_figure
    >>> figure = lens_figure([[0.2, 0.4], [0.9, 0.8]], [["a", "b"], ["c", "d"]], ["L0", "L1"], ["<bos>", "a"])
    >>> [list(row) for row in figure.data[0].text], figure.data[0].zmax
    ([['a', 'b'], ['c', 'd']], 1)
    """
    words = [[escaped(word.replace("\n", "↵")) for word in row] for row in top]
    figure = _grid(probability, sites, tokens, "token that is read", "site", title)
    figure.update_traces(
        text=words, texttemplate="%{text}", textfont={"size": 10}, colorscale=_SHARES, zmin=0, zmax=1,
        hovertemplate="%{y} after %{customdata}: %{text}, probability %{z:.3f}<extra></extra>",
        colorbar={"title": {"text": "probability", "side": "right"}},
    )  # fmt: skip
    figure.update_yaxes(autorange=True)
    return figure


def patching_figure(effects: Grid, sites: Sequence[str], positions: Sequence[str], *, title: str = "") -> "go.Figure":
    """What patching each site (rows) at each position (columns) restores: 0 the corrupted run, 1 the clean one.

    `effects` are `[sites, positions]`; orange is towards the clean run, blue away from it.

    >>> from probes.figures import patching_figure
    >>> figure = patching_figure([[0.1, 1.2], [0.0, -0.3]], ["L0.resid_pre", "L1.resid_pre"], ["a", "3"])
    >>> figure.data[0].zmin, figure.data[0].zmax
    (-1.2, 1.2)
    """
    figure = _grid(effects, sites, positions, "token that is patched", "site", title)
    _diverge(figure, effects, 1.0)
    figure.update_traces(
        hovertemplate="%{y} at %{customdata}: %{z:.3f}<extra></extra>",
        colorbar={"title": {"text": "effect", "side": "right"}},
    )
    return figure


def interactions_figure(
    interactions: Grid,
    parts: Sequence[str],
    *,
    found: Sequence[tuple[int, int]] = (),
    unit: str = "metric",
    title: str = "",
) -> "go.Figure":
    """effect(both) - effect(a) - effect(b) for each pair of parts, in units of the metric; pairs `found` are outlined.

    `interactions` are `[parts, parts]`; None, as on the diagonal, leaves a cell empty. Orange is above 0, blue below.

    >>> from probes.figures import interactions_figure
    >>> figure = interactions_figure([[None, 0.8], [0.8, None]], ["L0H1", "L0H3"], found=[(0, 1)])
    >>> figure.data[0].zmax, len(figure.layout.shapes)
    (0.8, 2)
    """
    figure = _grid(interactions, parts, parts, "part b", "part a", title)
    _diverge(figure, interactions, 0.0)
    figure.update_traces(
        hovertemplate="%{y} with %{customdata}: %{z:.4g}<extra></extra>",
        colorbar={"title": {"text": unit, "side": "right"}},
    )
    for row, column in [*found, *((b, a) for a, b in found)]:
        box = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
        figure.add_shape(type="rect", line={"color": PINK, "width": 3}, **box)
    return figure


def _grid(values: Grid, down: Sequence[str], across: Sequence[str], x: str, y: str, title: str) -> "go.Figure":
    """A heatmap whose columns may have the same name twice; NaN leaves a cell empty."""
    names = [escaped(name.replace("\n", "↵")) for name in across]
    figure = blank(x, y, title=title)
    figure.add_heatmap(
        z=[[None if np.isnan(value) else value for value in row] for row in _array(values).tolist()],
        x=list(range(len(names))),
        y=[escaped(name) for name in down],
        customdata=[names for _ in down],
        colorbar={"thickness": 12, "outlinewidth": 0, "tickformat": ".2~g"},
        xgap=1,
        ygap=1,
    )
    figure.update_xaxes(
        tickvals=list(range(len(names))), ticktext=names, showgrid=False, zeroline=False, tickangle=-90, automargin=True
    )
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, automargin=True)
    figure.update_layout(height=min(1000, 190 + 24 * len(down)), margin={"b": 96, "t": 48 if title else 16})
    return figure


def _diverge(figure: "go.Figure", values: Grid, least: float) -> None:
    """Colours on both sides of 0, as far as the largest value, or `least`."""
    sizes = np.abs(_array(values))
    largest = max(least, float(sizes[~np.isnan(sizes)].max(initial=0.0))) or 1.0
    figure.update_traces(zmin=-largest, zmax=largest, colorscale=[list(stop) for stop in DIVERGING])


def _array(values: Grid) -> Float[np.ndarray, "rows columns"]:
    return np.asarray(values, dtype=float)
