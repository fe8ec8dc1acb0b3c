"""Apply a recipe at run time: plain Hugging Face code, with a few hooks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._interface import listening
from probes.model.hooks import all_attached, hook_inputs, hook_site
from probes.model.passes import named_edit, touched_elsewhere
from probes.model.routers import hook_router
from probes.rows import Rows
from steer.interventions.attention import Attend
from steer.interventions.routing import RoutingEdit
from steer.recipes.recipe import Recipe
from steer.runtime.attending import Attending, Reached
from steer.runtime.edits import Edits, by_site, chained
from steer.runtime.firelog import FireLog
from steer.runtime.gates import clock_and_gates
from steer.runtime.regions import Regions, place_of
from steer.runtime.rerouting import Rerouting, Routed


class NeverFired(ValueError):
    """A recipe was applied, and touched no token.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, Recipe, applied
    >>> model = load("organism")
    >>> with applied(model, Recipe.of(model, [Add(Site(2, "resid_post"), torch.ones(96))])):
    ...     pass  # the model does not run
    Traceback (most recent call last):
        ...
    steer.runtime._applied.NeverFired: The recipe was applied, but touched no token: add at L2.resid_post, scope all...
    """


@contextmanager
def applied(
    model: PreTrainedModel, recipe: Recipe, *, must_fire: bool = True, must_run: bool = True
) -> Iterator[FireLog]:
    """While open, the model runs with the recipe; `model.generate` needs to know nothing of it.

    Gives the log of what is touched. Raises ValueError where the recipe was made on another model, or reads a site that
    is computed only after the edit it decides on; and, at the end of the block, `NeverFired` where no step touched
    a token, unless `must_fire` is false. With `must_run` false it is no error that the model did not run at all, as
    where a store had everything. An engine that runs the model elsewhere tells what was touched there; the log holds
    what was touched here.

    >>> import torch
    >>> from probes import Site, generate, load
    >>> from steer import Add, Recipe, applied
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Add(Site(2, "resid_post"), torch.ones(96), 0.05)], scope="thinking")
    >>> with applied(model, recipe) as log:
    ...     completion = generate(model, ["a 3 b +4 c *7"])[0]
    >>> completion.answer, log.tokens
    ('9', 10)
    """
    recipe.check(model)
    steps = recipe.steps
    attends = {number: step.intervention for number, step in enumerate(steps) if isinstance(step.intervention, Attend)}
    regions = Regions([place_of(edit) for edit in attends.values()])
    clock, gates = clock_and_gates(model, steps, needed=regions.needs_phases)
    words = [(str(step.intervention.site), step.intervention.kind, str(step.scope)) for step in steps]
    routes = {
        number: (step.intervention, Routed(gates[step.scope]))
        for number, step in enumerate(steps)
        if isinstance(step.intervention, RoutingEdit)
    }
    heads = {number: (edit, Reached(gates[steps[number].scope])) for number, edit in attends.items()}
    apart = routes | heads
    own = [apart[number][1] if number in apart else gates[step.scope] for number, step in enumerate(steps)]
    log = FireLog(words, own, clock.knows_phases)

    def see(ids: Tensor, mask: Tensor | None, n_past: int, rows: Rows | None) -> None:
        phases = clock.advance(ids, mask, n_past, rows)
        log.begin(phases)
        if attends:
            regions.begin(phases)
        for gate in gates.values():
            gate.begin(phases, ids)

    edits = Edits(model, log)
    with ExitStack() as stack:
        if steps:
            stack.enter_context(named_edit(model, recipe.fingerprint))
            stack.enter_context(hook_inputs(model, see))
        for scope, gate in gates.items():
            if scope.gauge is not None:
                stack.enter_context(hook_site(model, scope.gauge, gate.see))
        for layer in dict.fromkeys(edit.site.layer for edit, _ in routes.values()):
            routed = [(number, edit, gate) for number, (edit, gate) in routes.items() if edit.site.layer == layer]
            stack.enter_context(hook_router(model, layer, edit=Rerouting(model, layer, routed, log)))
        if attends:
            attending = Attending([(number, *rest) for number, rest in heads.items()], regions, log)
            stack.enter_context(listening(model, attending, layers=attending.layers))
        at = {
            site: chained([edits.of(number, step, gates[step.scope]) for number, step in found])
            for site, found in by_site((number, step) for number, step in enumerate(steps) if number not in apart)
        }
        if at:
            stack.enter_context(all_attached(model, at, name=recipe.fingerprint))
        yield log
        log.end_pass()
        elsewhere = touched_elsewhere(model, recipe.fingerprint()) if must_fire and not log.tokens else 0
    ran = must_run or log.ran or elsewhere is not None
    if must_fire and steps and not (log.tokens or elsewhere) and ran:
        raise NeverFired(
            f"The recipe was applied, but touched no token: {'; '.join(dict.fromkeys(map(_said, words)))}. Did the "
            "model run, and did it get to where the scope begins? With must_fire=False this is no error."
        )


def _said(words: tuple[str, str, str]) -> str:
    site, kind, scope = words
    return f"{kind} at {site}, scope {scope}"
