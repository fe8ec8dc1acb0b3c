"""Activation patching: what of one run, put into another, brings its output back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.figures.causal import patching_figure
from probes.late import go
from probes.lens.inputs import Source, token_ids
from probes.model.loading import tokenizer_of
from probes.model.routers import Routing
from probes.model.sites import Site
from probes.model.tokens import decode
from probes.tables import Shown, Table
from probes.words import checked
from steer.causal.metrics import Metric
from steer.causal.parts import Members, Part, named_parts, sites_of
from steer.causal.runs import Edit, Kept, Run, kept, measured

Way = Literal["denoise", "noise"]
Where = Literal["all", "each"]


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Patched(Shown):
    """What the metric is where each part is patched, so that 0 is the corrupted run's and 1 the clean run's; `clean`
    and `corrupted` are those two, in the metric's own units. A column for each of `positions`, or one for all at once.

    >>> from probes import load
    >>> from steer.causal import logit_difference, patched
    >>> found = patched(load("organism"), "a 3 b +4", "a 5 b +4", ["L3.resid_post"], metric=logit_difference(3, 56))
    >>> found.effect
    tensor([[1.]])
    """

    names: tuple[str, ...]
    positions: tuple[int, ...] | None
    tokens: tuple[str, ...]
    effect: Float[Tensor, "parts positions"]
    clean: float
    corrupted: float
    way: Way

    def __getitem__(self, name: str) -> float:
        """The effect of a part. Raises KeyError for one that was not patched, ValueError where it has several."""
        if name not in self.names:
            raise KeyError(f"{name!r} was not patched. Known: {', '.join(self.names[:8])}.")
        if self.effect.shape[1] != 1:
            raise ValueError(f"{name} was patched at {self.effect.shape[1]} positions: read a row of `effect`.")
        return float(self.effect[self.names.index(name), 0])

    def table(self, k: int = 10) -> Table:
        """The k patches that change most: towards the clean run, or, of noise, away from it."""
        rest, columns = (0.0 if self.way == "denoise" else 1.0), self.effect.shape[1]
        order = (self.effect - rest).abs().flatten().sort(descending=True, stable=True).indices[:k].tolist()
        labels = self._labels()
        rows = tuple((self.names[i // columns], labels[i % columns], float(self.effect.flatten()[i])) for i in order)
        title = f"{self.way}: 0 is {self.corrupted:+.3f}, 1 is {self.clean:+.3f}"
        return Table(("part", "at", "effect"), rows, title)

    def figure(self) -> "go.Figure":
        """Parts by positions."""
        return patching_figure(self.effect, self.names, self._labels())

    def _labels(self) -> list[str]:
        return ["all"] if self.positions is None else [f"{at} {self.tokens[at]}" for at in self.positions]


@checked
def patched(
    model: PreTrainedModel,
    clean: Source,
    corrupted: Source,
    parts: Sequence[Part] | Mapping[str, Part],
    *,
    metric: Metric,
    positions: Where | Sequence[int] = "all",
    way: Way = "denoise",
    batch_size: int = 64,
) -> Patched:
    """Activation patching (Wang et al. 2023; Heimersheim and Nanda 2024): the metric of the corrupted run where a part
    has the clean run's activation.

    A part is a site (`L2H3.z` is a head, `L2.routing` a router's choice), or a tuple of sites that are patched at once.
    `positions` are `all` at once, `each` by itself, or those given, each by itself. `noise` is the other way: the
    corrupted activation in the clean run, whose effect is 1 where nothing is lost. Patches are rows of batches. Raises
    ValueError where the prompts are not of one length, the metric is the same on both, or a part is no site.

    >>> from probes import load
    >>> from steer.causal import logit_difference, patched
    >>> clean, corrupted = [1, 6, 17, 7, 27, 5, 3, 56, 6, 48, 7, 27], [1, 6, 19, 7, 27, 5, 3, 56, 6, 50, 7, 27]
    >>> sites = [f"L{layer}.resid_post" for layer in range(4)]
    >>> found = patched(load("organism"), clean, corrupted, sites, metric=logit_difference(52, against=54))
    >>> found.effect.shape, round(found["L3.resid_post"], 3)
    (torch.Size([4, 1]), 1.0)
    """
    pair = Runs.of(model, clean, corrupted, parts, metric=metric, way=way)
    columns, read = columns_of(positions, len(pair.ids))
    runs = [
        Run(pair.ids, tuple(_edit(site, pair.other.at[site], at) for site in sites_of([members])), metric)
        for members in pair.parts.values()
        for at in columns
    ]
    values = measured(model, runs, batch_size=batch_size).unflatten(0, (len(pair.parts), len(columns)))
    effect = ((values - pair.corrupted) / (pair.clean - pair.corrupted)).float()
    return Patched(tuple(pair.parts), read, pair.tokens, effect, pair.clean, pair.corrupted, way)


@dataclass(frozen=True, eq=False)
class Runs:
    """The two runs of a patching: `ids` are those of the one that is patched, `base`; `other` gives the activations."""

    parts: dict[str, Members]
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    base: Kept
    other: Kept
    clean: float
    corrupted: float

    @classmethod
    def of(
        cls, model: PreTrainedModel, clean: Source, corrupted: Source, parts: Sequence[Part] | Mapping[str, Part], *,
        metric: Metric, way: Way,
    ) -> "Runs":  # fmt: skip
        """Both, without a patch. Raises ValueError where they cannot be compared."""
        known = named_parts(model, parts)
        for name, members in known.items():
            if len(sites_of([members])) < len(members):
                raise ValueError(f"{name} is no site, or names one twice: what is patched is an activation.")
            if single := [m for m in members if isinstance(m, Site) and m.expert is not None]:
                raise ValueError(f"{single[0]} is one expert's weight: patch the choice, L{single[0].layer}.routing.")
        rows = [token_ids(model, source) for source in (clean, corrupted)]
        if len(rows[0]) != len(rows[1]):
            raise ValueError(
                f"The clean prompt has {len(rows[0])} tokens, and the corrupted one {len(rows[1])}: position by "
                "position, one stands for the other. Give prompts of one length."
            )
        runs = [kept(model, ids, sites_of(list(known.values()))) for ids in rows]
        values = [float(metric(run.logits)) for run in runs]
        if abs(values[0] - values[1]) <= 1e-6 * max(1.0, abs(values[0])):
            raise ValueError(
                f"The metric is {values[0]:.4g} on both runs: there is nothing that a patch could restore."
            )
        tokens = tuple(decode(tokenizer_of(model), [token]) for token in rows[0])
        base = 1 if way == "denoise" else 0
        return cls(known, rows[base], tokens, runs[base], runs[1 - base], values[0], values[1])


def columns_of(
    positions: Where | Sequence[int], length: int
) -> tuple[list[Bool[Tensor, " pos"]], tuple[int, ...] | None]:
    """Which positions each column patches, as a mask, and the positions if each is one."""
    if positions == "all":
        return [torch.ones(length, dtype=torch.bool)], None
    read = tuple(range(length)) if positions == "each" else tuple(range(length)[int(at)] for at in positions)
    return [torch.arange(length) == at for at in read], read


def _edit(site: Site, value: Any, at: Bool[Tensor, " pos"]) -> Edit:
    return site, partial(_rerouted if site.name == "routing" else _put, value, at)


def _put(value: Tensor, at: Tensor, x: Tensor) -> Tensor:
    return torch.where(at.to(x.device)[:, None], value.to(x), x)


def _rerouted(value: Routing, at: Tensor, routing: Routing) -> Routing:
    mask = at.to(routing.ids.device)[None, :, None]
    ids, weights = torch.where(mask, value.ids, routing.ids), torch.where(mask, value.weights, routing.weights)
    return replace(routing, ids=ids, weights=weights)
