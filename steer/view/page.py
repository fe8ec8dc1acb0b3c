"""One HTML file of one chain, or of two: their words and numbers as data, and the scripts that show them."""

import json
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from jaxtyping import Real

from probes.figures.style import CYCLE
from probes.thinking.rules import LABELS
from steer.report.html import colours
from steer.view.alignment import aligned, shared
from steer.view.side import Side

_SCRIPTS = ("chain.js", "text.js", "chart.js", "viewer.js")
_KEYS = (
    ("/", "search; Enter and Shift Enter go on"),
    ("n N", "next and previous place that was found"),
    ("m M", "next and previous marker, of those chosen"),
    ("s S", "next and previous thought"),
    ("← → ↑ ↓", "from token to token, from row to row"),
    ("+ − 0", "zoom the tracks in, out, and to the whole chain; the wheel and dragging do as well"),
    ("1 … 9", "switch a track on or off"),
    ("t", "light or dark"),
    ("Esc", "leave the search, close what is open"),
    ("?", "this help"),
)


def page(title: str, sides: Sequence[Side]) -> str:
    """The whole file. It fetches nothing, and what models wrote is in it as data alone."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_style()}</style></head><body>{_body(title)}"
        f'<script type="application/json" id="data">{encoded(sides)}</script>'
        f"<script>{_script()}</script></body></html>\n"
    )


def encoded(sides: Sequence[Side]) -> str:
    """All that the page shows, as JSON without `<`, which could close its script."""
    two = sides if len(sides) == 2 else None
    words = {
        "sides": [_side(side) for side in sides],
        "pairs": [[0], [len(sides[0].texts)]] if two is None else aligned(*two),
        "shared": None if two is None else shared(*two),
        "colours": {label: CYCLE[i] for i, label in enumerate(LABELS)},
        "cycle": CYCLE,
    }
    return json.dumps(words, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _side(side: Side) -> dict[str, Any]:
    ids = (None,) * len(side.texts) if side.ids is None else side.ids
    known: dict[tuple[int | None, str], int] = {}
    index = [known.setdefault(pair, len(known)) for pair in zip(ids, side.texts, strict=True)]
    return {
        "name": side.name,
        "about": side.about,
        "texts": [text for _, text in known],
        "ids": None if side.ids is None else [i for i, _ in known],
        "index": packed(np.array(index, dtype=np.int64), "<u4"),
        "prompt": side.prompt,
        "thinking": side.thinking,
        "segments": [(s.start, s.stop, s.label) for s in side.segments],
        "markers": side.markers,
        "tracks": [
            {"name": t.name, "unit": t.unit, "group": t.group, "values": packed(t.values.float().numpy(), "<f4")}
            for t in side.tracks
        ],
    }


def packed(values: Real[np.ndarray, " n"], kind: str) -> str:
    """Numbers as the bytes of an array, in base64."""
    return b64encode(values.astype(kind).tobytes()).decode()


def _body(title: str) -> str:
    keys = "".join(f"<tr><td>{_kbd(key)}</td><td>{escape(what)}</td></tr>" for key, what in _KEYS)
    return (
        f'<header><div class="tools"><h1>{escape(title)}</h1>'
        '<div role="search"><input id="find" type="search" placeholder="search  /" aria-label="search the text">'
        '<output id="found" aria-live="polite"></output>'
        '<button id="previous" title="previous (N)" disabled>↑</button>'
        '<button id="next" title="next (n)" disabled>↓</button></div>'
        '<div><select id="marker" aria-label="markers to jump to"></select>'
        '<button id="earlier" title="previous marker (M)">↑</button>'
        '<button id="later" title="next marker (m)">↓</button></div>'
        '<div><select id="shade" aria-label="colour the text by"><option value="">colour the text by …</option>'
        '</select></div><span class="spring"></span>'
        '<button id="link" aria-pressed="true" title="scroll both sides together">together</button>'
        '<button id="theme" title="light or dark (t)">light / dark</button>'
        '<button id="open-help" title="keys (?)">?</button></div><div id="tracks" class="chips"></div></header>'
        '<main id="sides"></main><div id="tip" role="tooltip" hidden></div>'
        f'<dialog id="help"><table>{keys}</table><form method="dialog"><button>close</button></form></dialog>'
        "<noscript>This page shows a chain of thought by its own scripts, which are switched off here.</noscript>"
    )


def _kbd(keys: str) -> str:
    return " ".join(f"<kbd>{escape(key)}</kbd>" for key in keys.split())


@cache
def _style() -> str:
    return colours() + (files("steer.view") / "viewer.css").read_text(encoding="utf-8")


@cache
def _script() -> str:
    return "\n".join((files("steer.view") / name).read_text(encoding="utf-8") for name in _SCRIPTS)


@cache
def _policy() -> str:
    """Nothing may be fetched or sent, and no script and no style counts but the page's own, known by checksums."""
    script, style = (b64encode(sha256(text.encode()).digest()).decode() for text in (_script(), _style()))
    return f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; form-action 'none'"
