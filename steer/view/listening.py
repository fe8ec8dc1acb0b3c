"""Tracks read off a model: all readings listen to one pass over the chain, and tell when it is over."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from transformers import DynamicCache, PreTrainedModel

from probes.generation.completions import Completion
from probes.model.positions import check_room, passes_rope_limit
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied
from steer.runtime.firelog import FireLog
from steer.view.track import Track

Tell = Callable[[], list[Track]]
Reading = Callable[[PreTrainedModel, Completion], AbstractContextManager[Tell]]
"""Opened, it listens to the model's passes over a completion; what it gives is called when they are over."""

CHUNK = 2_048  # tokens of a pass: logits are wide
_FEW = 4  # steps of a recipe that have a track each


@torch.no_grad()
def read_tracks(
    model: PreTrainedModel,
    completion: Completion,
    readings: Sequence[Reading],
    *,
    recipe: Recipe | None = None,
) -> list[Track]:
    """What each reading tells of a completion, in order, from one pass of the model over it, prompt included.

    Under a `recipe` all of it is read of the steered model; first come its own tracks, ‖Δ‖/‖x‖ at each token of each
    step, or of the strongest where there are many. Long chains are read in parts, with a cache. Raises ValueError for a
    chain that is longer than the model's positions, and whatever a reading does.

    >>> from probes import generate, load
    >>> from steer.view import confidence, read_tracks, trajectory
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> [track.name for track in read_tracks(model, completion, [confidence(), trajectory(segment=3)])]
    ['log-probability', 'entropy', 'net change', 'cumulative change']
    """
    tracks: list[Track] = []
    with ExitStack() as under:
        log = None if recipe is None else under.enter_context(applied(model, recipe, must_fire=False))
        if log is not None:
            log.keep()
        with ExitStack() as stack:
            tells = [stack.enter_context(reading(model, completion)) for reading in readings]
            _run(model, completion.all_ids)
        if log is not None:
            tracks += touched(log, completion)
        for tell in tells:  # one that needs a pass of its own makes it now, under the recipe too
            tracks += tell()
    return tracks


def touched(log: FireLog, completion: Completion) -> list[Track]:
    """Where a recipe touched a completion, and how hard: ‖Δ‖/‖x‖ at each token of each step, or of the strongest where
    there are many.

    The log is of the run that wrote it, alone, with `keep` called before. Raises ValueError where it was not, and where
    several rows were written.

    >>> from probes import Site, generate, load
    >>> from steer import Recipe, Scale, applied
    >>> from steer.view import touched, view
    >>> model = load("organism")
    >>> with applied(model, Recipe.of(model, [Scale(Site(2, "mlp_out"), 0.5)], scope="answer")) as log:
    ...     log.keep()
    ...     (completion,) = generate(model, ["a 3 b +4"])
    >>> [track.name for track in view(completion, model=model, tracks=touched(log, completion)).sides[0].tracks]
    ['scale at L2.mlp_out, answer']
    """
    ratios = log.ratios(len(completion.all_ids))
    if len(ratios) > _FEW:
        strongest = ratios.nan_to_num(-1.0).amax(0)
        name = f"the strongest of {len(ratios)} steps"
        return [Track(name, strongest.where(strongest >= 0, torch.nan), "‖Δ‖/‖x‖", "recipe")]
    names = [f"{kind} at {site}, {scope}" for site, kind, scope in log.steps]
    told = [name if names.count(name) == 1 else f"{i}: {name}" for i, name in enumerate(names)]
    return [Track(name, row, "‖Δ‖/‖x‖", "recipe") for name, row in zip(told, ratios.unbind(), strict=True)]


def _run(model: PreTrainedModel, ids: Sequence[int]) -> None:
    check_room(model, len(ids))
    whole = len(ids) <= CHUNK or passes_rope_limit(model, len(ids))
    cache, size = (None, len(ids)) if whole else (DynamicCache(config=model.config), CHUNK)
    for start in range(0, len(ids), size):
        part = torch.tensor([ids[start : start + size]], device=model.device)
        mask = part.new_ones(1, start + part.shape[1])
        model(input_ids=part, attention_mask=mask, past_key_values=cache, use_cache=cache is not None)
