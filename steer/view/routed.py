"""Readings of a sparse model's routing: how busy the experts of each token are, and the weights of those that lead."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from probes.evidence.association import npmi
from probes.generation.completions import Completion
from probes.model.loading import markers_of, tokenizer_of
from probes.model.routers import Expert, Routing, block_at, hook_router, moe_layers
from steer.view.listening import Reading, Tell
from steer.view.side import marker_places, token_texts
from steer.view.track import Track

LEAST = 5  # tokens that an expert must be chosen at, or nPMI would rank by rarity alone


def experts(*chosen: Expert, top: int = 3, markers: Sequence[str] | None = None) -> Reading:
    """How busy the experts of each token are, and the routing weight of some experts, 0 where one is not chosen.

    The load of a token is the mean, over layers and the experts that it chose, of how often each is chosen in this
    chain, over how often it would be if all were chosen alike: 1 is even. The experts are those `chosen` (layer and
    number), or else the `top` by nPMI with the `markers` (those of the model, if left out) among the generated tokens
    of this chain alone: leaders to look at, and no evidence. The reading raises ValueError for a model without experts.

    >>> from probes import generate, load
    >>> from steer.view import experts, read_tracks
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> [track.name for track in read_tracks(model, completion, [experts((2, 1), (3, 0))])]
    ['load', 'L2E1', 'L3E0']
    """

    @contextmanager
    def reading(model: PreTrainedModel, completion: Completion) -> Iterator[Tell]:
        layers = moe_layers(model)
        if unknown := [
            one for one in chosen if one[0] not in layers or not 0 <= one[1] < block_at(model, one[0]).n_experts
        ]:
            raise ValueError(
                f"{_name(unknown[0])} is no expert of this model. Layers with experts: {str(layers)[1:-1]}."
            )
        found: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

        def see(layer: int, routing: Routing) -> None:
            found[layer].append((routing.ids[0].cpu(), routing.weights[0].float().cpu()))

        def tell() -> list[Track]:
            ids = {layer: torch.cat([part for part, _ in parts]) for layer, parts in found.items()}
            weights = {layer: torch.cat([part for _, part in parts]) for layer, parts in found.items()}
            sizes = {layer: block_at(model, layer).n_experts for layer in layers}
            shown = chosen or _leaders(ids, sizes, *_marked(model, completion, markers), top)
            tracks = [Track("load", _load(ids, sizes), "times an even load", "experts")]
            for layer, number in shown:
                weight = (weights[layer] * (ids[layer] == number)).sum(-1)
                tracks.append(Track(_name((layer, number)), weight, "routing weight", "experts"))
            return tracks

        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(hook_router(model, layer, see=partial(see, layer)))
            yield tell

    return reading


def _name(expert: Expert) -> str:
    return f"L{expert[0]}E{expert[1]}"


def _load(ids: Mapping[int, Int[Tensor, "tokens k"]], sizes: Mapping[int, int]) -> Float[Tensor, " tokens"]:
    each = []
    for layer, own in ids.items():
        counts = own.flatten().bincount(minlength=sizes[layer]).float()
        each.append((counts * sizes[layer] / own.numel())[own].mean(-1))
    return torch.stack(each).mean(0)


def _marked(model: PreTrainedModel, completion: Completion, markers: Sequence[str] | None) -> tuple[list[int], slice]:
    """Where markers end, and the tokens that they are among."""
    wanted = markers_of(model) if markers is None else markers
    texts, begin = token_texts(tokenizer_of(model), completion.all_ids), len(completion.prompt_ids)
    ends = {last for marker in wanted for _, last in marker_places(texts, marker, begin)}
    return sorted(ends), slice(begin, None)


def _leaders(
    ids: Mapping[int, Int[Tensor, "tokens k"]], sizes: Mapping[int, int], ends: Sequence[int], among: slice, top: int
) -> list[Expert]:
    """The experts that go most with the tokens at `ends`; none where there are none."""
    scored: list[tuple[float, Expert]] = []
    for layer, own in ids.items():
        at = own[list(ends)].flatten().bincount(minlength=sizes[layer]).numpy()
        routed = own[among].flatten().bincount(minlength=sizes[layer]).numpy()
        if ends:
            values = np.asarray(npmi(at, routed, len(ends), len(own[among])))
            scored += [(float(values[i]), (layer, int(i))) for i in np.flatnonzero((routed >= LEAST) & (at > 0))]
    return [expert for _, expert in sorted(scored, key=lambda one: (-one[0], one[1]))[:top]]
