"""Attribution patching: all patches at once from one gradient, and how far that can be trusted."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.late import stats
from probes.lens.inputs import Source, last_logits
from probes.model.architectures import has_site, row_at, width_of
from probes.model.hooks import all_attached
from probes.model.sites import SITE_NAMES, Site
from probes.words import checked
from steer.causal._patched import Patched, Runs, Way, Where, columns_of
from steer.causal.metrics import Metric
from steer.causal.parts import Part, sites_of
from steer.causal.runs import own_part


@dataclass(frozen=True)
class Faithfulness:
    """How well an approximation of `n` effects agrees with the exact ones: their correlation (Pearson), that of their
    ranks (Spearman), both NaN where either is constant, and the share with one sign.

    >>> from steer.causal import Faithfulness
    >>> Faithfulness(pearson=0.98, spearman=0.9, sign_agreement=0.95, n=32).n
    32
    """

    pearson: float
    spearman: float
    sign_agreement: float
    n: int

    @classmethod
    def of(cls, approximate: Patched, exact: Patched) -> "Faithfulness":
        """Of two patchings of the same parts. Raises ValueError where they are of other parts, positions or ways."""
        one, other = ((x.names, x.positions, x.way, x.tokens) for x in (approximate, exact))
        if one != other:
            raise ValueError("These are patchings of other parts, positions, ways or prompts: they cannot be compared.")
        rest = 0.0 if exact.way == "denoise" else 1.0  # where nothing changes
        a, b = ((x.effect.flatten().double() - rest).numpy() for x in (approximate, exact))
        varied = len(a) > 1 and bool((a != a[0]).any() and (b != b[0]).any())
        pearson = float(stats.pearsonr(a, b).statistic) if varied else float("nan")
        spearman = float(stats.spearmanr(a, b).statistic) if varied else float("nan")
        return cls(pearson, spearman, float(((a > 0) == (b > 0)).mean()), len(a))


@checked
def attribution_patched(
    model: PreTrainedModel,
    clean: Source,
    corrupted: Source,
    parts: Sequence[Part] | Mapping[str, Part],
    *,
    metric: Metric,
    positions: Where | Sequence[int] = "all",
    way: Way = "denoise",
) -> Patched:
    """As `patched`, to first order: (clean - corrupted activation) . gradient of the metric in the run that is patched
    *(Nanda 2023; Syed et al. 2023)*.

    Three passes and a backward one, however many patches. How far it can be trusted is measured: see `Faithfulness.of`.
    Raises ValueError as `patched` does, and for a router's choice, which has no gradient.

    >>> from probes import load
    >>> from steer.causal import Faithfulness, attribution_patched, logit_difference, patched
    >>> clean, corrupted = [1, 6, 17, 7, 27, 5, 3, 56, 6, 48, 7, 27], [1, 6, 19, 7, 27, 5, 3, 56, 6, 50, 7, 27]
    >>> model, metric = load("organism"), logit_difference(52, against=54)
    >>> heads = [f"L{layer}H{head}.z" for layer in range(4) for head in range(8)]
    >>> exact = patched(model, clean, corrupted, heads, metric=metric)
    >>> fast = attribution_patched(model, clean, corrupted, heads, metric=metric)
    >>> Faithfulness.of(fast, exact).n
    32
    """
    pair = Runs.of(model, clean, corrupted, parts, metric=metric, way=way)
    columns, read = columns_of(positions, len(pair.ids))
    sites = sites_of(list(pair.parts.values()))
    if routed := [site for site in sites if site.name == "routing"]:
        raise ValueError(f"{routed[0]} is a choice, and has no gradient: patch it with `patched`.")
    gradients = _gradients(model, pair.ids, sites, metric)
    each = {
        site: ((_wide(pair.other.at[site]) - _wide(pair.base.at[site])) * _wide(gradients[site])).sum(-1)
        for site in sites
    }
    masks = torch.stack(columns).double()
    summed = torch.stack(
        [masks @ torch.stack([each[site] for site in sites_of([m])]).sum(0) for m in pair.parts.values()]
    )
    start = pair.corrupted if way == "denoise" else pair.clean
    effect = ((start + summed - pair.corrupted) / (pair.clean - pair.corrupted)).float()
    return Patched(tuple(pair.parts), read, pair.tokens, effect, pair.clean, pair.corrupted, way)


def _gradients(
    model: PreTrainedModel, ids: tuple[int, ...], sites: Sequence[Site], metric: Metric
) -> dict[Site, Float[Tensor, "pos width"]]:
    """Of the metric, with respect to the activation at each site, from one backward pass."""
    at = {site: _added_at(model, site) for site in sites}
    wholes = sorted(set(at.values()), key=lambda site: (site.layer, SITE_NAMES.index(site.name)))
    with torch.enable_grad(), ExitStack() as stack:
        nudges = {
            whole: torch.zeros(1, len(ids), width_of(model, whole), dtype=model.dtype, requires_grad=True)
            for whole in wholes
        }
        stack.enter_context(all_attached(model, {whole: partial(_nudged, nudges[whole]) for whole in wholes}))
        value = metric(last_logits(model, torch.tensor([ids], device=model.device))[0])
        found = dict(zip(wholes, torch.autograd.grad(value, list(nudges.values())), strict=True))
    return {site: own_part(model, found[at[site]][0], site) for site in sites}


def _added_at(model: PreTrainedModel, site: Site) -> Site:
    """Where a nudge is added: between attention and MLP it is as if attention had added it."""
    has_sum = site.name == "resid_mid" and has_site(model, site.layer, "attn_out")
    return Site(site.layer, "attn_out" if has_sum and not row_at(model, site.layer).normed else site.name)


def _nudged(nudge: Tensor, x: Tensor) -> Tensor:
    return x + nudge.to(x.device)


def _wide(x: Tensor) -> Tensor:
    return x.double().cpu()
