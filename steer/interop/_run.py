"""The steps of a recipe that change activations, to be taken by the hooks of others."""

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

from probes.model.positions import real_tokens
from probes.model.sites import Site
from steer.interventions.attention import Attend
from steer.interventions.routing import RoutingEdit
from steer.recipes.recipe import Recipe, Step
from steer.runtime.edits import by_site
from steer.runtime.firelog import FireLog
from steer.runtime.gates import clock_and_gates


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
        self.clock, self.gates = clock_and_gates(model, self.steps)
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
        return by_site(enumerate(self.steps))
