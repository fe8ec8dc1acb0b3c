"""Many runs of the model, each with changes of its own, as the rows of few batches."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.lens.inputs import last_logits
from probes.model.architectures import n_heads
from probes.model.hooks import all_attached, captured
from probes.model.routers import Routing, hook_router
from probes.model.sites import SITE_NAMES, Site
from steer.causal.metrics import Metric

# What a row has at a site becomes what: an activation [pos, width], or a Routing of a batch of one.
Edit = tuple[Site, Callable[[Any], Any]]


@dataclass(frozen=True, eq=False)
class Run:
    """The ids of one row, what is changed in it, and what of its logits is looked at."""

    ids: tuple[int, ...]
    edits: tuple[Edit, ...]
    metric: Metric


@dataclass(frozen=True, eq=False)
class Kept:
    """What one run had at some sites, `[pos, width]` or a Routing, and its logits after the last token."""

    at: dict[Site, Any]
    logits: Float[Tensor, " d_vocab"]


@torch.no_grad()
def kept(model: PreTrainedModel, ids: Sequence[int], sites: Sequence[Site]) -> Kept:
    """A plain run over the ids, read at the sites: at a head's `z` that head alone, at an expert its whole router."""
    wanted = dict.fromkeys(map(_whole, sites))
    found: dict[Site, Any] = {}
    with ExitStack() as stack:
        cache = stack.enter_context(captured(model, [site for site in wanted if site.name != "routing"]))
        for site in wanted:
            if site.name == "routing":
                see = partial(found.__setitem__, site)
                stack.enter_context(hook_router(model, site.layer, see=see))
        logits = last_logits(model, torch.tensor([list(ids)], device=model.device))[0]
    found |= {site: x[0] for site, x in cache.items()}
    return Kept({site: own_part(model, found[_whole(site)], site) for site in sites}, logits)


@torch.no_grad()
def measured(model: PreTrainedModel, runs: Sequence[Run], *, batch_size: int) -> Float[Tensor, " runs"]:
    """The metric of each run, in float64. Runs of one length share a batch, whatever is changed in them."""
    out = torch.zeros(len(runs), dtype=torch.float64)
    for rows in _batches([len(run.ids) for run in runs], batch_size):
        out[rows] = _batch(model, [runs[row] for row in rows])
    return out


def own_part(model: PreTrainedModel, x: Any, site: Site) -> Any:
    """The part of what is at the whole site that is the site's own: a view."""
    if site.name != "z" or site.head is None:
        return x
    return x.unflatten(-1, (n_heads(model, site.layer), -1))[..., site.head, :]


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for number, length in enumerate(lengths):
        by_length[length].append(number)
    for numbers in by_length.values():
        yield from (numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size))


def _batch(model: PreTrainedModel, runs: Sequence[Run]) -> Float[Tensor, " runs"]:
    edits: defaultdict[Site, list[tuple[int, Edit]]] = defaultdict(list)
    for row, run in enumerate(runs):
        for edit in run.edits:
            edits[_whole(edit[0])].append((row, edit))
    order = sorted(edits, key=lambda site: (site.layer, SITE_NAMES.index(site.name), site.head or 0))
    with ExitStack() as stack:
        changes = {site: partial(_changed, model, edits[site]) for site in order if site.name != "routing"}
        if changes:
            stack.enter_context(all_attached(model, changes))
        for site in order:
            if site.name == "routing":
                stack.enter_context(hook_router(model, site.layer, edit=partial(_rerouted, edits[site])))
        logits = last_logits(model, torch.tensor([run.ids for run in runs], device=model.device))
    return torch.stack([run.metric(row).double().cpu() for run, row in zip(runs, logits, strict=True)])


def _changed(model: PreTrainedModel, edits: Sequence[tuple[int, Edit]], x: Tensor) -> Tensor:
    new = x.clone()
    for row, (site, change) in edits:
        own = own_part(model, new[row], site)
        own[:] = change(own.clone())
    return new


def _rerouted(edits: Sequence[tuple[int, Edit]], routing: Routing) -> Routing:
    ids, weights = routing.ids.clone(), routing.weights.clone()
    for row, (_, change) in edits:
        at = slice(row, row + 1)
        new = change(Routing(routing.logits[at], weights[at], ids[at]))
        ids[at], weights[at] = new.ids, new.weights
    return replace(routing, ids=ids, weights=weights)


def _whole(site: Site) -> Site:
    """The site at which a hook changes it: heads share that of their layer's `z`, experts that of their router."""
    return Site(site.layer, site.name) if site.name in ("z", "routing") else site
