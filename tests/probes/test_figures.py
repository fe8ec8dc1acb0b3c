"""Every kind of figure with twelve arms, drawn in a browser: no two labels overlap, and no two arms look alike."""

import html
import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest
from browser import BOXES, browsed, overlaps
from plotly.offline import get_plotlyjs

from probes import figures
from probes.figures import Dose, Point

ARMS = [f"arm number {i}" for i in range(12)]
WORDS = [
    "<think>",
    "Okay",
    "a",
    "=",
    "3",
    "b",
    "+",
    "4",
    "=",
    "7",
    "Wait",
    ",",
    "no",
    "c",
    "*",
    "7",
    "=",
    "9",
    "</think>",
    "9",
]
GRID = np.sin(np.arange(144).reshape(12, 12)).round(2).tolist()
DOSES = [Dose(x, 12 + x, (11 + x, 13 + x), 0.6, (0.5, 0.7), 0.0) for x in (1.0, 2.0, 4.0, 8.0)]
SHARES = np.linspace(0.3, 0.9, 12).tolist()

KINDS = {
    "evidence": lambda: figures.evidence_figure(
        range(12), SHARES, null=[(0.4, 0.6)] * 12, random=[(0.3, 0.7)] * 12,
        confounds={name: SHARES[::-1] for name in ARMS},
    ),
    "heads": lambda: figures.heads_figure(GRID, edited=[(1, 2), (3, 4)], title="Heads of twelve layers"),
    "arms": lambda: figures.arms_figure([
        Point(name, 10 + i, 0.4 + 0.03 * i, (0.35 + 0.03 * i, 0.45 + 0.03 * i), group)
        for i, name in enumerate(ARMS) for group in ("all problems", "marked")
    ]),
    "grids": lambda: figures.grids_figure(
        {"norm": GRID, "cosine": GRID}, down=ARMS, across=[str(i) for i in range(12)]
    ),
    "sweep": lambda: figures.sweep_figure(DOSES, DOSES, title="The length direction"),
    "scores": lambda: figures.scores_figure(dict.fromkeys(ARMS, GRID), range(12), title="nPMI"),
    "loads": lambda: figures.loads_figure(dict.fromkeys(ARMS, np.abs(GRID)), range(12), title="Load"),
    "usage": lambda: figures.usage_figure(np.abs(GRID), ARMS, WORDS[:12], marked=[3], title="Routing weights"),
    "doses": lambda: figures.doses_figure(dict.fromkeys(ARMS, DOSES), plain=DOSES[0], title="Reinforced"),
    "latents": lambda: figures.latents_figure(
        WORDS, {name: [float(i)] * len(WORDS) for i, name in enumerate(ARMS)}, marked=[0], title="Latents"
    ),
    "verdicts": lambda: figures.verdicts_figure(
        range(12), SHARES, SHARES[::-1], ["word", "phase", "both", "neither"] * 3, title="What latents follow"
    ),
    "chain": lambda: figures.chain_figure(
        WORDS, {name: {"value": [0.5] * len(WORDS)} for name in ARMS},
        segments=[(0, 5, "execution"), (5, 9, "reflection")], title="One chain",
    ),
    "reliability": lambda: figures.reliability_figure([(10, share, share) for share in SHARES]),
    "lens": lambda: figures.lens_figure(np.abs(GRID), [WORDS[:12]] * 12, ARMS, WORDS[:12], title="Layers"),
    "patching": lambda: figures.patching_figure(GRID, ARMS, WORDS[:12], title="Patches"),
    "interactions": lambda: figures.interactions_figure(GRID, ARMS, found=[(0, 3)], title="Together"),
}  # fmt: skip

SCRIPT = f"""
const boxes = {BOXES};
document.body.innerHTML = '<pre id="told">' + JSON.stringify(boxes).replaceAll('<', '&lt;') + '</pre>';
"""


@pytest.fixture(scope="module", params=[900, 1600])
def drawn(request, tmp_path_factory):
    """The boxes of all words of each kind, at a width of the page."""
    folder = tmp_path_factory.mktemp(f"drawn{request.param}")
    parts = [f"<script>{get_plotlyjs()}</script>"]
    for kind, make in KINDS.items():
        drawing = make().to_json().replace("</", "<\\/")
        parts.append(
            f'<div class="plot" id="{kind}"></div><script>Plotly.newPlot("{kind}", ...(f => [f.data, f.layout])'
        )
        parts.append(f"({drawing}))</script>")
    parts.append(f"<script>addEventListener('load', () => setTimeout(() => {{{SCRIPT}}}, 500))</script>")
    page = folder / "figures.html"
    page.write_text("<!doctype html><meta charset=utf-8><body>" + "".join(parts))
    dom, log = browsed(page, folder / "profile", f"--window-size={request.param},2000")
    assert "CONSOLE" not in log
    return json.loads(html.unescape(re.search('<pre id="told">(.*?)</pre>', dom, re.DOTALL)[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_labels_overlap_and_none_is_cut_off(drawn, kind):
    boxes, (left, top, right, bottom) = drawn[kind]["found"], drawn[kind]["whole"]
    assert len(boxes) > 8
    assert overlaps(boxes) == []
    outside = [b[0] for b in boxes if b[1] < left - 1 or b[2] < top - 1 or b[3] > right + 1 or b[4] > bottom + 1]
    assert outside == []


def test_labels_that_overlap_are_seen():
    assert overlaps([["a", 0, 0, 10, 10], ["b", 5, 5, 15, 15], ["c", 20, 0, 30, 10]]) == [("a", "b")]


def test_every_kind_is_drawn():
    named = {name.removesuffix("_figure") for name in figures.__all__ if name.endswith("_figure")} - {"save"}
    assert named == set(KINDS)


def test_no_two_arms_look_alike():
    for kind in ("arms", "doses", "latents", "evidence"):
        figure = KINDS[kind]()
        looks = {}
        for trace in figure.data:
            if trace.name in ARMS and trace.showlegend is not False:
                looks.setdefault(looked(trace), set()).add(trace.name)
        assert sum(map(len, looks.values())) == 12, kind
        assert [names for names in looks.values() if len(names) > 1] == [], kind


def looked(trace: go.Scatter):
    line = trace.line.color, trace.line.dash
    return (*line, trace.marker.color, trace.marker.symbol)
