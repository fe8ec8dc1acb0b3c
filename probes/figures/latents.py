"""Figures of latents: along a chain, and what two controls say of each."""

from collections.abc import Mapping, Sequence

from probes.figures.style import GREY, blank, escaped, line_of, mark_of, settled
from probes.late import go

_VERDICTS = ("word", "phase", "both", "neither")


def latents_figure(
    tokens: Sequence[str], activations: Mapping[str, Sequence[float]], *, marked: Sequence[int] = (), title: str = ""
) -> "go.Figure":
    """The activation of some latents at each token of one chain, in the autoencoder's units; a token is told where one
    points at it. Lines stand at `marked` places, such as the delimiters of the thinking.

    >>> from probes.figures import latents_figure
    >>> figure = latents_figure(["<think>", "Wait", ",", "no"], {"latent 7": [0.0, 3.2, 0.4, 0.0]}, marked=[0])
    >>> figure.data[0].y, len(figure.layout.shapes)
    ((0.0, 3.2, 0.4, 0.0), 1)
    """
    figure = blank("token", "activation", title=title)
    words = [escaped(token.replace("\n", "↵")) for token in tokens]
    for i, (name, values) in enumerate(activations.items()):
        line = {**line_of(i), "width": 1.6}
        figure.add_scatter(
            x=list(range(len(words))), y=list(values), name=escaped(name), mode="lines", line=line, text=words,
            hovertemplate="%{text}<br>%{y:.2f}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    for place in marked:
        figure.add_vline(x=place, line={"color": GREY, "width": 1, "dash": "dot"})
    return settled(figure)


def verdicts_figure(
    latents: Sequence[int],
    by_cue: Sequence[float],
    without_cues: Sequence[float],
    verdicts: Sequence[str],
    *,
    bar: float = 0.5,
    title: str = "",
) -> "go.Figure":
    """Each latent by how much of what it does in reasoning text cues alone bring out, and how much stays without them.

    Lines stand at `bar`, the share from which a control counts. To the right lie latents of words, above those of
    phases. Shares are drawn within [-0.5, 1.5].

    >>> from probes.figures import verdicts_figure
    >>> figure = verdicts_figure([3, 7], [0.9, 0.1], [0.0, 0.8], ["word", "phase"])
    >>> [trace.name for trace in figure.data]
    ['word', 'phase']
    """
    figure = blank("brought out by cues alone", "stays without cues", title=title)
    for i, verdict in enumerate(_VERDICTS):
        own = [j for j, told in enumerate(verdicts) if told == verdict]
        if not own:
            continue
        figure.add_scatter(
            x=[_within(by_cue[j]) for j in own], y=[_within(without_cues[j]) for j in own], name=verdict,
            mode="markers", marker={**mark_of(i), "size": 10},
            text=[f"latent {latents[j]}" for j in own], hovertemplate="%{text}<br>%{x:.2f}, %{y:.2f}<extra></extra>",
        )  # fmt: skip
    line = {"color": GREY, "width": 1, "dash": "dot"}
    figure.add_vline(x=bar, line=line)
    figure.add_hline(y=bar, line=line)
    figure.update_xaxes(range=[-0.6, 1.6])
    figure.update_yaxes(range=[-0.6, 1.6])
    return figure


def _within(share: float) -> float:
    return min(1.5, max(-0.5, float(share)))
