"""Figures of one chain on its token axis, and of what confidences are worth."""

from collections.abc import Mapping, Sequence

from probes.figures.style import CYCLE, GREY, blank, dress, escaped, line_of, see_through, settled
from probes.late import go, subplots

_LABELS = ("execution", "reflection", "transition", "backtracking", "answer")
_ROOM = 0.06


def chain_figure(
    tokens: Sequence[str],
    panels: Mapping[str, Mapping[str, Sequence[float | None]]],
    *,
    segments: Sequence[tuple[int, int, str]] = (),
    title: str = "",
) -> "go.Figure":
    """One chain: `panels`, each with lines of a number a token, one below the other on one axis of tokens.

    Behind them lie the `segments`, (start, stop, label), in the colour of their label; a number that is not known at a
    token is None, and the line goes on to the next that is. Raises ValueError for a line of another length.

    >>> from probes.figures import chain_figure
    >>> panels = {"projection": {"L2": [0.1, 0.4, 0.2]}, "confidence": {"log-probability": [-0.1, None, -0.3]}}
    >>> figure = chain_figure(["Okay", "a", "=3"], panels, segments=[(0, 2, "execution"), (2, 3, "reflection")])
    >>> [trace.name for trace in figure.data if trace.mode == "lines"], len(figure.layout.shapes)
    (['L2', 'log-probability'], 4)
    """
    for panel, lines in panels.items():
        for name, values in lines.items():
            if len(values) != len(tokens):
                raise ValueError(f"The line {name!r} of {panel!r} has {len(values)} numbers, for {len(tokens)} tokens.")
    figure = subplots.make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=_ROOM)
    dress(figure, title)
    words = [escaped(token.replace("\n", "↵")) for token in tokens]
    colour = {label: CYCLE[i % len(CYCLE)] for i, label in enumerate(_LABELS)}
    number = 0
    for row, (panel, lines) in enumerate(panels.items(), start=1):
        figure.update_yaxes(
            title_text=escaped(panel), row=row, col=1, gridcolor=see_through(GREY, 0.28), zeroline=False
        )
        for name, values in lines.items():
            figure.add_scatter(
                x=list(range(len(words))), y=list(values), name=escaped(name), mode="lines", connectgaps=True,
                text=words,
                line={**line_of(number), "width": 1.8},
                hovertemplate="%{text}<br>%{y:.3g}<extra>%{fullData.name}</extra>", row=row, col=1,
            )  # fmt: skip
            number += 1
        for start, stop, label in segments:
            fill = see_through(colour.get(label, GREY), 0.12)
            figure.add_vrect(x0=start - 0.5, x1=stop - 0.5, fillcolor=fill, line_width=0, layer="below", row=row, col=1)
    for label in dict.fromkeys(label for _, _, label in segments):
        marker = {"color": see_through(colour.get(label, GREY), 0.4), "symbol": "square", "size": 12}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=escaped(label))
    figure.update_xaxes(gridcolor=see_through(GREY, 0.28), zeroline=False)
    figure.update_xaxes(title_text="token of the chain", row=len(panels), col=1)
    figure.update_layout(height=140 + 170 * len(panels))
    return settled(figure)


def reliability_figure(
    bins: Sequence[tuple[int, float, float]], *, intervals: Sequence[tuple[float, float]] | None = None, title: str = ""
) -> "go.Figure":
    """Answers by confidence: for each of `bins`, (answers, mean confidence, share right), a point whose area is its
    answers; on the diagonal confidence is what it says.

    >>> from probes.figures import reliability_figure
    >>> figure = reliability_figure([(20, 0.6, 0.5), (80, 0.9, 0.95)])
    >>> figure.data[1].x, figure.data[1].y
    ((0.6, 0.9), (0.5, 0.95))
    """
    figure = blank("confidence", "share right", title=title)
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": GREY, "dash": "dot", "width": 1}, name="as stated"
    )
    most = max((n for n, _, _ in bins), default=1)
    bars = None
    if intervals is not None:
        above = [high - right for (_, high), (_, _, right) in zip(intervals, bins, strict=True)]
        below = [right - low for (low, _), (_, _, right) in zip(intervals, bins, strict=True)]
        bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    figure.add_scatter(
        x=[sure for _, sure, _ in bins], y=[right for _, _, right in bins], mode="markers+lines", error_y=bars,
        marker={"size": [8 + 22 * (n / most) ** 0.5 for n, _, _ in bins], "color": CYCLE[0]},
        text=[f"{n} answers" for n, _, _ in bins], name="answers",
        hovertemplate="%{text}<br>%{x:.2f}, right %{y:.2f}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(range=[-0.03, 1.03])
    figure.update_yaxes(range=[-0.03, 1.03])
    return figure
