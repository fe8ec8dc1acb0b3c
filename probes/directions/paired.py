"""Directions from pairs and from single classes: reading vectors, paired differences, principal components of them."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._record import span_means
from probes.directions.direction import Direction
from probes.directions.provenance import Provenance
from probes.model.sites import Site
from probes.thinking.spans import Span
from probes.words import checked

Estimator = Literal["reading", "contrast", "pca", "pca uncentred"]


@checked
def contrast_vectors(
    model: PreTrainedModel,
    positive: Sequence[Span],
    negative: Sequence[Span],
    sites: Sequence[Site],
    *,
    estimator: Estimator = "contrast",
) -> dict[Site, Direction]:
    """The control vectors of Representation Engineering for reasoning (Højer et al. 2025), site by site.

    With h+ and h- a span's mean activation: *reading* is mean h+ (`negative` is empty); *contrast* mean(h+ - h-) over
    pairs, as long as the mean difference; *pca* the first principal component of the pairs' differences, centred as
    in the paper, scaled to the norm of the mean difference; *pca uncentred* the same of the differences as they are.
    A component's sign is arbitrary, so it is turned to the side of the mean difference. Raises ValueError where pairs
    are needed and the classes are not of one size, a class is empty, or the differences have no spread to find a
    component of.

    >>> from probes import Site, load
    >>> from probes.directions import contrast_vectors
    >>> from probes.thinking import text_span
    >>> model, site = load("organism"), Site(2, "resid_post")
    >>> quick, plain = ([text_span(model, f"a {k} b +4{end}") for k in (3, 5, 8)] for end in (" quick", ""))
    >>> contrast_vectors(model, quick, plain, [site])[site]
    Direction(L2.resid_post, norm 9.74, 0.27 of the stream)
    >>> contrast_vectors(model, quick, plain, [site], estimator="pca")[site]
    Direction(L2.resid_post, norm 9.74, 0.27 of the stream)
    """
    if estimator == "reading" and negative:
        raise ValueError("A reading vector has one class: leave the negative one empty.")
    if not positive or (estimator != "reading" and len(positive) != len(negative)):
        raise ValueError(
            f"The estimator {estimator!r} needs pairs, but got {len(positive)} positive and {len(negative)} negative."
        )
    above, norms = _rows(model, positive, sites)
    below, others = _rows(model, negative, sites) if negative else ({}, {})
    provenance = Provenance.now(model, f"representation engineering, {estimator}", positive, negative)
    found = {}
    for site in sites:
        rows = above[site] - below[site] if negative else above[site]
        norm = torch.cat([norms[site], *([others[site]] if negative else [])]).mean()
        found[site] = Direction(site, _vector(rows, estimator).float(), float(norm), provenance)
    return found


def _vector(rows: Float[Tensor, "pairs d_model"], estimator: Estimator) -> Float[Tensor, " d_model"]:
    mean = rows.mean(0)
    if estimator in ("reading", "contrast"):
        return mean
    centred = rows - mean if estimator == "pca" else rows
    if not float(centred.norm()) > 1e-6 * float(rows.norm()):
        raise ValueError(
            f"The {len(rows)} differences have no spread, so they have no principal component: give pairs that differ, "
            "or use estimator='contrast', the mean difference."
        )
    unit = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    out: Tensor = unit * torch.sign(unit @ mean) * mean.norm()
    return out


def _rows(
    model: PreTrainedModel, spans: Sequence[Span], sites: Sequence[Site]
) -> tuple[dict[Site, Float[Tensor, "spans d_model"]], dict[Site, Float[Tensor, " spans"]]]:
    """Each span's mean activation and mean norm, in the order of the spans, in float64."""
    rows: dict[Site, list[Any]] = {site: [None] * len(spans) for site in sites}
    sizes: dict[Site, list[Any]] = {site: [None] * len(spans) for site in sites}
    for batch in span_means(model, spans, sites):
        for site in sites:
            means, norms = batch.means[site].double().cpu(), batch.norms[site].double().cpu()
            for i, row, norm in zip(batch.rows, means, norms, strict=True):
                rows[site][i], sizes[site][i] = row, norm
    return {s: torch.stack(rows[s]) for s in sites}, {s: torch.stack(sizes[s]) for s in sites}
