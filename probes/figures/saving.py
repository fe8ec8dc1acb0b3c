"""Figures as files."""

from importlib.util import find_spec
from pathlib import Path

from probes.files import staged_file
from probes.late import go


def save_figure(figure: "go.Figure", path: str | Path, *, width: int = 900, scale: float = 2) -> Path:
    """A figure as a picture, `.png`, `.svg` or `.pdf`, drawn by the Chromium of this machine, or as a page, `.html`,
    that needs no network. Whole or not at all.

    `width` is in pixels, each `scale` dots wide and high. Raises ValueError for another ending, ImportError where what
    draws pictures is not installed: `pip install 'thinksteer[jupyter]'`.

    >>> from pathlib import Path
    >>> from probes.figures import Point, arms_figure, save_figure
    >>> figure = arms_figure([Point("plain", 12.1, 0.58, (0.55, 0.61)), Point("edited", 15.8, 0.80, (0.77, 0.82))])
    >>> save_figure(figure, "arms.html").stat().st_size > 1_000_000
    True
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf", "html"):
        raise ValueError(f"A figure is saved as .png, .svg, .pdf or .html, not as {path.name!r}.")
    if kind != "html" and find_spec("kaleido") is None:
        raise ImportError(
            "A picture of a figure is drawn by kaleido: pip install 'thinksteer[jupyter]', or save .html."
        )
    with staged_file(path) as stage:
        if kind == "html":
            figure.write_html(stage, include_plotlyjs=True)
        else:
            figure.write_image(stage, format=kind, width=width, scale=scale)
    return path
