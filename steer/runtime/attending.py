"""Attends at work: what the heads of a layer pay to a region, and what that makes of their output."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.activations._interface import Bias, Biased, visible
from steer.interventions.affine import widened
from steer.interventions.attention import Attend
from steer.runtime.firelog import FireLog
from steer.runtime.gates import Gate
from steer.runtime.regions import Regions, place_of


class Reached:
    """The tokens of a gate's pass that see a key of the region: a gate of its own for the log."""

    multiple = None

    def __init__(self, gate: Gate) -> None:
        self.gate, self.mask = gate, torch.zeros(0, 0, dtype=torch.bool)


Numbered = tuple[int, Attend, Reached]


class Attending:
    """All Attends of a recipe: those of different heads of a layer at once, others one after another."""

    def __init__(self, edits: Sequence[Numbered], regions: Regions, log: FireLog) -> None:
        self.regions, self.log = regions, log
        self.layers: dict[int, list[list[Numbered]]] = {}
        for number, edit, reached in edits:
            if edit.strength == 0 and reached.gate.scope.varies:
                raise ValueError(
                    f"An attend of strength 0 at {edit.site} is done or not: its scope can have no schedule."
                )
            waves = self.layers.setdefault(edit.site.layer, [[]])
            if waves[-1] and any(_meet(edit, other) for _, other, _ in waves[-1]):
                waves.append([])
            waves[-1].append((number, edit, reached))

    def __call__(self, layer: int, biased: Biased) -> Biased:
        for wave in self.layers[layer]:
            before = biased
            biases = [bias for _, edit, reached in wave if (bias := self._bias(edit, reached, biased)) is not None]
            biased = before.with_biases(biases)
            for number, edit, _ in wave:
                self._note(number, edit, before, biased)
        return biased

    def _bias(self, edit: Attend, reached: Reached, biased: Biased) -> Bias | None:
        """What a step adds to the scores; None where it is known to change none."""
        query, gate = biased.attention.query, reached.gate
        scope = gate.mask.to(query.device)
        keys = self.regions.keys(place_of(edit), biased.attention.key.shape[2]).to(query.device)
        if scope.shape != (len(query), query.shape[2]):
            raise ValueError(
                f"Layer {edit.site.layer} attends from {query.shape[2]} queries in {len(query)} rows, for "
                f"{scope.shape[1]} new tokens in {len(scope)}: its queries are not the tokens, and cannot be scoped."
            )
        reached.mask = scope & _reaches(biased, keys)
        if edit.strength == 1 or (query.shape[2] > 1 and not reached.mask.any()):  # a long pass may wait for that
            return None
        amount = torch.full(
            scope.shape, -math.inf if edit.strength == 0 else math.log(edit.strength), device=query.device
        )
        if gate.multiple is not None:
            amount = amount * gate.multiple.to(query.device, amount.dtype)
        return Bias(amount.where(reached.mask, 0), keys, edit.site.head)

    def _note(self, number: int, edit: Attend, before: Biased, after: Biased) -> None:
        head = edit.site.head
        old, new = (
            widened(x.output.flatten(2) if head is None else x.output[:, :, head]).detach() for x in (before, after)
        )
        self.log.note_norms(number, _norm(old), _norm(new - old))


def _meet(a: Attend, b: Attend) -> bool:
    return a.site.head is None or b.site.head is None or a.site.head == b.site.head


def _reaches(biased: Biased, keys: Bool[Tensor, "batch keys"]) -> Bool[Tensor, "batch new"]:
    """Which queries see one of these keys."""
    parts = [
        (visible(biased.attention.seen(rows)) & keys[:, None, None]).any(-1).any(1)
        for rows in biased.attention.chunks()
    ]
    return torch.cat(parts, dim=1)


def _norm(x: Float[Tensor, "batch new width"]) -> Float[Tensor, "batch new"]:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm
