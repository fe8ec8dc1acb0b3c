"""The steps of a recipe that change activations, to be taken by the hooks of others."""

from collections.abc import Iterator, Mapping
from itertools import groupby

from torch import Tensor
from transformers import PreTrainedModel

from probes.model.positions import real_tokens
from probes.model.sites import SITE_NAMES, Site
from probes.thinking.phases import Clock
from steer.interventions.attention import Attend
from steer.interventions.routing import RoutingEdit
from steer.recipes.recipe import Recipe, Step
from steer.recipes.scope import Scope
from steer.runtime.firelog import FireLog
from steer.runtime.gates import Gate


class Run:
    """One run of a recipe: which tokens of the current pass each step touches. Raises ValueError for a step that
    `hooks`, named in the message, cannot take."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, hooks: str) -> None:
        self.steps = recipe.steps
        for step in self.steps:
            if isinstance(step.intervention, Attend | RoutingEdit):
                raise ValueError(
                    f"{step.intervention.kind} at {step.intervention.site} is no change to an activation, so {hooks} "
                    "cannot make it. Run theirs inside of steer.applied(model, recipe), which can."
                )
        scopes = list(dict.fromkeys(step.scope for step in self.steps))
        needed = any(scope.phase != "all" or scope.condition is not None for scope in scopes)
        markers = list(dict.fromkeys(scope.markers for scope in scopes if scope.markers))
        self.clock = Clock.of(model, needed=needed, markers=markers)
        self.gates: Mapping[Scope, Gate] = {scope: Gate(scope, self.clock.markers) for scope in scopes}
        words = [(str(step.intervention.site), step.intervention.kind, str(step.scope)) for step in self.steps]
        self.log = FireLog(words, [self.gates[step.scope] for step in self.steps], self.clock.knows_phases)
        self.seen = 0

    def begin(self, ids: Tensor, mask: Tensor | None = None, n_past: int = 0) -> None:
        """A new pass, whose rows have `n_past` tokens before it."""
        self.seen = n_past + ids.shape[1]
        phases = self.clock.advance(ids, real_tokens(mask, ids, n_past), n_past)
        self.log.begin(phases)
        for gate in self.gates.values():
            gate.begin(phases, ids)

    def sites(self) -> Iterator[tuple[Site, list[tuple[int, Step]]]]:
        """The sites in the order in which they are computed, with the steps at each, numbered."""
        order = sorted(enumerate(self.steps), key=lambda own: _place(own[1].intervention.site))
        for site, found in groupby(order, key=lambda own: own[1].intervention.site):
            yield site, list(found)


def _place(site: Site) -> tuple[int, int, int]:
    return site.layer, SITE_NAMES.index(site.name), -1 if site.head is None else site.head
