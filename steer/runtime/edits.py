"""A step at work: its tensors are where its site is, and what it changed is noted."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.model.architectures import device_at
from probes.model.sites import SITE_NAMES, Site
from steer.interventions.activation import Add, Intervention, placed
from steer.interventions.affine import Linear, widened
from steer.recipes.recipe import Step
from steer.runtime.firelog import FireLog
from steer.runtime.gates import Gate

Edit = Callable[[Float[Tensor, "batch new width"]], Float[Tensor, "batch new width"]]


def chained(edits: Sequence[Edit]) -> Edit:
    """One after another."""
    if len(edits) == 1:
        return edits[0]

    def apply(x: Tensor) -> Tensor:
        for edit in edits:
            x = edit(x)
        return x

    return apply


def by_site(steps: Iterable[tuple[int, Step]]) -> Iterator[tuple[Site, list[tuple[int, Step]]]]:
    """The sites of numbered steps in the order in which they are computed, with the steps at each."""
    order = sorted(steps, key=lambda own: _place(own[1].intervention.site))
    for site, found in groupby(order, key=lambda own: own[1].intervention.site):
        yield site, list(found)


def _place(site: Site) -> tuple[int, int, int]:
    return site.layer, SITE_NAMES.index(site.name), -1 if site.head is None else site.head


@dataclass(eq=False)
class Edits:
    """The steps of a recipe at work on a model, each behind its gate, noted in one log."""

    model: PreTrainedModel
    log: FireLog
    _vectors: "dict[tuple[Gate, int, torch.device], _Vectors]" = field(default_factory=dict)

    def of(self, number: int, step: Step, gate: Gate) -> Edit:
        """What a step does to the activation at its site, in the pass that the gate and the log are in."""
        assert isinstance(step.intervention, Intervention)
        intervention = placed(step.intervention, device_at(self.model, step.intervention.site.layer))
        if isinstance(intervention, Add):
            return self._adding(number, intervention, gate)
        return _changing(number, intervention, gate, self.log)

    def _adding(self, number: int, intervention: Add, gate: Gate) -> Edit:
        vector = intervention.strength * widened(intervention.vector)
        vectors = self._vectors.setdefault((gate, len(vector), vector.device), _Vectors(gate))
        row, norm, note = vectors.take(vector), float(vector.norm()), self.log.note

        def add(x: Tensor) -> Tensor:
            note(number, x, norm)
            return vectors.added(x, row)

        return add


class _Vectors:
    """The vectors that the steps behind one gate add at sites of one width. Those of a decode step are scaled by the
    gate's weight in one operation for all."""

    def __init__(self, gate: Gate) -> None:
        self.gate, self.vectors = gate, list[Tensor]()
        self._tables: dict[torch.dtype, Tensor] = {}
        self._scaled: dict[torch.dtype, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def take(self, vector: Float[Tensor, " width"]) -> int:
        """The row that it has from now on."""
        self.vectors.append(vector)
        return len(self.vectors) - 1

    def added(self, x: Float[Tensor, "batch new width"], row: int) -> Float[Tensor, "batch new width"]:
        dtype = x.dtype
        if dtype not in self._tables:
            self._tables[dtype] = torch.stack(self.vectors).to(dtype)[:, None, None]
        if x.shape[1] > 1:
            return torch.addcmul(x, self.gate.weight(dtype, x.device), self._tables[dtype][row])
        known = self._scaled.get(dtype)
        if known is None or known[0] is not self.gate.mask:
            known = self._scaled[dtype] = self.gate.mask, self.gate.scaled(self._tables[dtype]).unbind()
        return x + known[1][row]


def _changing(number: int, intervention: Intervention, gate: Gate, log: FireLog) -> Edit:
    change: Callable[[Tensor], Tensor] = intervention
    if isinstance(intervention, Linear) and intervention.vector is not None:
        change = intervention.affine(len(intervention.vector))  # made once, of low rank

    def edit(x: Tensor) -> Tensor:
        new = change(x)
        if gate.scope.varies:
            wide = widened(x)
            new = (wide + gate.weight(wide.dtype, x.device) * (widened(new) - wide)).to(x.dtype)
        new = new.where(gate.mask.to(x.device)[..., None], x)
        log.note(number, x, new)
        return new

    return edit
