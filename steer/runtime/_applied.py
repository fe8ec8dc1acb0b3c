"""Apply a recipe at run time: plain Hugging Face code, with a few hooks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._interface import listening
from probes.model.hooks import all_attached, hook_inputs, hook_site
from probes.model.passes import named_edit, touched_elsewhere
from probes.model.routers import hook_router
from probes.model.sites import Site
from probes.rows import Rows
from probes.thinking.phases import Clock
from steer.interventions.attention import Attend
from steer.interventions.routing import RoutingEdit
from steer.recipes.recipe import Recipe, Step
from steer.runtime.attending import Attending, Reached
from steer.runtime.edits import Edits, chained
from steer.runtime.firelog import FireLog
from steer.runtime.gates import Gate, precedes
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
    scopes = list(dict.fromkeys(step.scope for step in steps))
    needed = any(scope.phase != "all" or scope.condition is not None for scope in scopes)
    attends = {number: step.intervention for number, step in enumerate(steps) if isinstance(step.intervention, Attend)}
    regions = Regions([place_of(edit) for edit in attends.values()])
    needed = needed or regions.needs_phases
    clock = Clock.of(model, needed=needed, markers=list(dict.fromkeys(s.markers for s in scopes if s.markers)))
    gates = {scope: Gate(scope, clock.markers) for scope in scopes}
    for step in steps:
        _check_order(step, clock)
    words = [(str(_site(step)), step.intervention.kind, str(step.scope)) for step in steps]
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
        order = sorted(set(range(len(steps))) - set(apart), key=lambda number: _place(steps[number]))
        at = {
            site: chained([edits.of(number, steps[number], gates[steps[number].scope]) for number in found])
            for site, found in groupby(order, key=lambda number: _site(steps[number]))
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


def _check_order(step: Step, clock: Clock) -> None:
    scope, site = step.scope, _site(step)
    if scope.gauge is not None and not precedes(scope.gauge, site):
        raise ValueError(f"The scope of {site} reads {scope.gauge}, which is computed after it: read an earlier site.")
    if scope.condition is not None and not clock.delimiters.turn:
        raise ValueError(
            "A condition is judged at the end of the prompt, but the chat template writes no header before the model's "
            "turn, so that end cannot be told. Set the tokenizer's chat template, or give Delimiters(turn=...)."
        )


def _site(step: Step) -> Site:
    return step.intervention.site


def _place(step: Step) -> tuple[Any, ...]:
    site = _site(step)
    return site.layer, site.name, -1 if site.head is None else site.head


def _said(words: tuple[str, str, str]) -> str:
    site, kind, scope = words
    return f"{kind} at {site}, scope {scope}"
