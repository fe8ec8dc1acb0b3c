"""Readings by the names that a command line has for them."""

import re
from pathlib import Path

from probes.directions.direction import Direction
from probes.model.routers import Expert
from probes.saes.loading import load_sae
from steer.view.listening import Reading
from steer.view.readings import attention, confidence, latents, projections, trajectory
from steer.view.routed import experts

WAYS = (
    "confidence, trajectory[:SEGMENT], experts[:L2E1,L3E0], direction:FILE, latents:SAE:6,171, attention:WORDS OF THE "
    "PROMPT"
)


def reading_named(name: str) -> Reading:
    """`confidence`, `trajectory`, `trajectory:500`, `experts`, `experts:L2E1,L3E0`, `direction:FILE`,
    `latents:SAE:6,171` or `attention:WORDS`. Raises ValueError for another, and for a file that is none.

    >>> from probes import generate, load
    >>> from steer.view import read_tracks, reading_named
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> [track.name for track in read_tracks(model, completion, [reading_named("latents:organism-L1:6,171")])]
    ['latent 6', 'latent 171']
    """
    kind, _, rest = name.partition(":")
    if kind == "confidence" and not rest:
        return confidence()
    if kind == "trajectory" and re.fullmatch(r"|[1-9]\d*", rest):
        return trajectory(int(rest) if rest else None)
    if kind == "experts" and re.fullmatch(r"|L\d+E\d+(,L\d+E\d+)*", rest):
        return experts(*map(_expert, rest.split(",") if rest else ()))
    if kind == "direction" and rest:
        return projections({Path(rest).stem: Direction.load(Path(rest))})
    if kind == "latents" and (found := re.fullmatch(r"(.+):(\d+(?:,\d+)*)", rest)):
        return latents(load_sae(found[1]), [int(number) for number in found[2].split(",")])
    if kind == "attention" and rest:
        return attention(rest)
    raise ValueError(f"{name!r} is not a reading. Known: {WAYS}.")


def _expert(name: str) -> Expert:
    layer, number = name[1:].split("E")
    return int(layer), int(number)
