"""What stands in the place of a part that is knocked out, and what each prompt's metric is without it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._record import record
from probes.lens.inputs import Source, token_ids
from probes.model.architectures import device_at
from probes.model.routers import Routing
from probes.model.sites import Site
from probes.thinking.spans import Span
from steer.causal.metrics import Metric, metrics_of
from steer.causal.parts import Members, sites_of
from steer.causal.runs import Edit, Run, kept, measured
from steer.interventions.activation import placed

Knock = Literal["zero", "mean", "resample"]
Key = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Stand:
    """What takes a part's place: zero; the mean over references; what the part held for another prompt.

    An expert that is knocked out writes nothing, and the others keep their weights.
    """

    kind: Knock
    means: Mapping[Site, Tensor] = field(default_factory=dict)
    donors: Sequence[Mapping[Site, Any]] = ()

    @classmethod
    def of(
        cls, model: PreTrainedModel, kind: Knock, prompts: Sequence[tuple[int, ...]],
        reference: Sequence[tuple[int, ...]], sites: Sequence[Site], *, seed: int,
    ) -> "Stand":  # fmt: skip
        """For prompts, and the sites that are knocked out. Raises ValueError for the mean of a routing, the routing of
        one expert from elsewhere, and a prompt that no reference of its length can stand in for."""
        if kind == "zero" or not sites:
            return cls(kind)
        if kind == "mean":
            if routed := [site for site in sites if site.name == "routing"]:
                raise ValueError(f"{routed[0]} is a choice, and has no mean: knock experts out with kind='zero'.")
            moments = record(model, [Span(ids, 0, len(ids)) for ids in reference], sites, label="")
            return cls(kind, {site: moments[site].activation.mean for site in sites})
        if single := [site for site in sites if site.expert is not None]:
            raise ValueError(
                f"{single[0]} is one expert's weight, which means nothing beside another prompt's choice: resample "
                f"L{single[0].layer}.routing, or knock experts out with kind='zero'."
            )
        rng, held = np.random.default_rng(seed), dict[tuple[int, ...], Mapping[Site, Any]]()
        donors = []
        for ids in prompts:
            able = [other for other in dict.fromkeys(reference) if len(other) == len(ids) and other != ids]
            if not able:
                raise ValueError(
                    f"No reference stands in for a prompt of {len(ids)} tokens: it must be another one of as many."
                )
            other = able[int(rng.integers(len(able)))]
            if other not in held:
                held[other] = kept(model, other, sites).at
            donors.append(held[other])
        return cls(kind, donors=donors)

    def edits(self, model: PreTrainedModel, prompt: int, members: Members) -> tuple[Edit, ...]:
        """The changes of one prompt's run."""
        found: list[Edit] = []
        for member in members:
            if not isinstance(member, Site):
                found.append((member.site, placed(member, device_at(model, member.site.layer))))
            elif self.kind == "zero":
                found.append((member, partial(_silenced, member.expert) if member.name == "routing" else _zero))
            elif self.kind == "mean":
                found.append((member, partial(_filled, self.means[member])))
            else:
                found.append((member, partial(_replaced, self.donors[prompt][member])))
        return tuple(found)


def _zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _filled(mean: Tensor, x: Tensor) -> Tensor:
    return mean.to(x).expand_as(x)


def _replaced(value: Any, _x: Any) -> Any:
    return value


def _silenced(expert: int | None, routing: Routing) -> Routing:
    weights = routing.weights
    gone = torch.ones_like(routing.ids, dtype=torch.bool) if expert is None else routing.ids == expert
    return replace(routing, weights=weights.masked_fill(gone, 0.0))


def key_of(members: Members) -> Key:
    """The same for parts that are the same, in whatever order; an intervention is itself alone."""
    return tuple(sorted(str(one) if isinstance(one, Site) else f"{one.site} {id(one)}" for one in members))


def effects(
    model: PreTrainedModel,
    prompts: Sequence[Source],
    groups: Sequence[Members],
    *,
    metric: Metric | Sequence[Metric],
    kind: Knock,
    reference: Sequence[Source],
    seed: int,
    batch_size: int,
) -> tuple[Float[np.ndarray, " prompts"], dict[Key, Float[np.ndarray, " prompts"]]]:
    """Each prompt's metric as it is, and how much is added to it where each group is changed; each group once.

    Raises ValueError where there is no prompt.
    """
    if not prompts:
        raise ValueError("Effects are measured on prompts, but none was given.")
    rows, metrics = [token_ids(model, prompt) for prompt in prompts], metrics_of(metric, len(prompts))
    others = [token_ids(model, source) for source in reference] or rows
    stand = Stand.of(model, kind, rows, others, sites_of(groups), seed=seed)
    known = {key_of(group): group for group in groups}
    runs = [
        Run(ids, stand.edits(model, number, group), metrics[number])
        for group in ((), *known.values())
        for number, ids in enumerate(rows)
    ]
    found = measured(model, runs, batch_size=batch_size).unflatten(0, (-1, len(rows))).numpy()
    return found[0], {key: found[i + 1] - found[0] for i, key in enumerate(known)}
