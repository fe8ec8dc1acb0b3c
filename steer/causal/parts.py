"""Parts of a model that are changed: sites, heads, experts, or interventions, alone or several together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from probes.model.architectures import layers_with_heads, n_heads, sites_in, tap_of
from probes.model.routers import block_at, moe_layers
from probes.model.sites import Site
from steer.interventions.activation import Intervention
from steer.interventions.routing import check_expert

One = Site | str | Intervention
Part = One | tuple[One, ...]
Member = Site | Intervention
Members = tuple[Member, ...]


def named_parts(model: PreTrainedModel, parts: Sequence[Part] | Mapping[str, Part]) -> dict[str, Members]:
    """The parts by their names: those they are given by, or what they are.

    A head's `result` is taken for its `z`, which makes it. Raises ValueError or IndexError for a site that the model
    does not have, and for two parts of one name.
    """
    given = list(parts.items()) if isinstance(parts, Mapping) else [("", part) for part in parts]
    found: dict[str, Members] = {}
    for name, part in given:
        ones = part if isinstance(part, tuple) else (part,)
        known = name or " + ".join(_said(one) for one in ones)
        if known in found:
            raise ValueError(f"Two parts are named {known!r}: give each once, or names of their own.")
        found[known] = tuple(_member(model, one) for one in ones)
    if not found or not all(found.values()):
        raise ValueError("No part was given, or one that is empty: name sites, heads, experts or interventions.")
    return found


def sites_of(groups: Sequence[Members]) -> list[Site]:
    """The sites whose activation is replaced, each once."""
    return list(dict.fromkeys(member for group in groups for member in group if isinstance(member, Site)))


def others_like(model: PreTrainedModel, member: Site) -> list[Site]:
    """All parts of the model that are of the member's kind, itself among them: heads, experts, or the site of each
    layer."""
    if member.head is not None:
        return [Site(layer, "z", head) for layer in layers_with_heads(model) for head in range(n_heads(model, layer))]
    if member.expert is not None:
        experts = ((layer, range(block_at(model, layer).n_experts)) for layer in moe_layers(model))
        return [Site(layer, "routing", expert=expert) for layer, numbers in experts for expert in numbers]
    if member.name == "routing":
        return [Site(layer, "routing") for layer in moe_layers(model)]
    return sites_in(model, member.name)


def _member(model: PreTrainedModel, one: One) -> Member:
    if isinstance(one, Site | str):
        site = Site.parse(one) if isinstance(one, str) else one
        if site.name == "routing":
            check_expert(model, site)
            return site
        tap_of(model, site)
        return replace(site, name="z") if site.name == "result" else site
    one.check(model)
    return one


def _said(one: One) -> str:
    return str(one) if isinstance(one, Site | str) else f"{one.kind} at {one.site}"
