"""How well a direction tells two classes apart on what it has not seen, and what could fake it."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._record import span_means
from probes.directions.direction import Direction
from probes.evidence.layers import Evidence, LayerEvidence, Range
from probes.late import stats
from probes.model.architectures import sites_in
from probes.model.sites import Site, SiteName
from probes.thinking.spans import Span
from probes.words import checked

MINIMUM = 4


@checked
def evidence_for(
    model: PreTrainedModel,
    positive: Sequence[Span],
    negative: Sequence[Span],
    *,
    site: SiteName = "resid_mid",
    seed: int = 0,
    n_bootstrap: int = 200,
    n_permutations: int = 200,
) -> Evidence:
    """Evidence for the direction from the negative to the positive class, in every layer.

    One pass over the spans, whose means are kept: float32 numbers, spans x layers x d_model. The confounds are where a
    span starts (the prompt's length), how long it is, and where its middle is. Raises ValueError where a class has
    fewer than 4 spans.

    >>> from probes import load
    >>> from probes.evidence import evidence_for
    >>> from probes.thinking import text_span
    >>> model = load("organism")
    >>> quick, plain = ([text_span(model, f"a {k} b +4{end}") for k in range(6)] for end in (" quick", ""))
    >>> evidence = evidence_for(model, quick, plain, n_bootstrap=20, n_permutations=20)
    >>> evidence.best().auroc, evidence.best().confounds["span length"]
    (1.0, 1.0)
    """
    spans, sites = [*positive, *negative], sites_in(model, site)
    means: Tensor | None = None
    for batch in span_means(model, spans, sites, label="evidence"):
        stacked = torch.stack([batch.means[place].cpu() for place in sites], dim=1)
        means = torch.empty(len(spans), *stacked.shape[1:]) if means is None else means
        means[batch.rows] = stacked
    confounds = {
        "prompt length": torch.tensor([float(span.start) for span in spans]),
        "span length": torch.tensor([float(span.stop - span.start) for span in spans]),
        "mean position": torch.tensor([(span.start + span.stop - 1) / 2 for span in spans]),
    }
    labels = torch.tensor([True] * len(positive) + [False] * len(negative))
    halves = halves_of(labels, seed=seed)
    assert means is not None
    found = [
        evidence_of(
            means[:, i],
            labels,
            confounds,
            halves,
            place,
            seed=seed,
            n_bootstrap=n_bootstrap,
            n_permutations=n_permutations,
        )
        for i, place in enumerate(sites)
    ]
    return Evidence(tuple(found), len(positive), len(negative))


def halves_of(labels: Bool[Tensor, " n"], *, seed: int = 0) -> Bool[Tensor, " n"]:
    """True for the half of each class that a direction is derived from; the rest is held out."""
    if min(int(labels.sum()), int((~labels).sum())) < MINIMUM:
        raise ValueError(
            f"Evidence needs {MINIMUM} spans of each class, but got {int(labels.sum())} positive and "
            f"{int((~labels).sum())} negative."
        )
    derive, rng = torch.zeros_like(labels), torch.Generator().manual_seed(seed)
    for value in (True, False):
        rows = (labels == value).nonzero()[:, 0]
        derive[rows[torch.randperm(len(rows), generator=rng)[: len(rows) // 2]]] = True
    return derive


def evidence_of(
    means: Float[Tensor, "n d_model"],
    labels: Bool[Tensor, " n"],
    confounds: Mapping[str, Float[Tensor, " n"]],
    derive: Bool[Tensor, " n"],
    site: Site,
    *,
    seed: int = 0,
    n_bootstrap: int = 200,
    n_permutations: int = 200,
) -> LayerEvidence:
    """The evidence in one layer, from the spans' means alone."""
    rng = torch.Generator().manual_seed(seed)
    means = means.double()
    (a, b), (la, lb) = (means[derive], means[~derive]), (labels[derive], labels[~derive])
    direction = _contrast(la[None]) @ a
    auroc_ = float(_aurocs(direction @ b.T, lb[None])[0])

    shuffled_a, shuffled_b = (_shuffled(part, n_permutations, rng) for part in (la, lb))
    null = _aurocs(_contrast(shuffled_a) @ a @ b.T, shuffled_b)
    drawn = torch.randn(n_permutations, means.shape[1], generator=rng, dtype=torch.float64)
    random = _aurocs(drawn @ b.T, lb.expand(n_permutations, -1))
    one, other = (_resampled(part, n_bootstrap, rng) @ half for part, half in ((la, a), (lb, b)))
    cosine = torch.cosine_similarity(one, other, dim=1)

    outside = torch.stack([torch.ones(len(means)), *(c for c in confounds.values())], dim=1).double()
    outside = outside / outside.abs().amax(0).clamp(min=1e-12)
    fit = torch.linalg.lstsq(outside[derive], (a @ direction[0])[:, None], driver="gelsd").solution
    left = b @ direction[0] - (outside[~derive] @ fit)[:, 0]
    return LayerEvidence(
        site=site,
        auroc=auroc_,
        null=_range(null),
        p=(1 + int((null >= auroc_).sum())) / (1 + n_permutations),
        random=_range(random),
        cosine=_range(cosine),
        confounds={name: float(_aurocs(c[None, ~derive].double(), lb[None])[0]) for name, c in confounds.items()},
        beyond=float(_aurocs(left[None], lb[None])[0]),
    )


def project(
    model: PreTrainedModel, spans: Sequence[Span], directions: Sequence[Direction]
) -> Float[Tensor, "n_directions n"]:
    """Projection of each span's mean activation on each direction's unit vector."""
    out = torch.empty(len(directions), len(spans), dtype=torch.float64)
    sites = list({direction.site for direction in directions})
    for batch in span_means(model, spans, sites, label="projecting"):
        for i, direction in enumerate(directions):
            mean = batch.means[direction.site]
            out[i, batch.rows] = (mean @ direction.unit.to(mean.device)).double().cpu()
    return out


def auroc(positive: Float[Tensor, " n"], negative: Float[Tensor, " m"]) -> float:
    """The chance that a positive value is above a negative one; ties count half.

    In [0, 1], 0.5 where they are not told apart *(Mann and Whitney 1947)*.

    >>> import torch
    >>> from probes.evidence import auroc
    >>> auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 3.0]))
    0.625
    """
    u = stats.mannwhitneyu(np.asarray(positive), np.asarray(negative)).statistic
    return float(u) / (len(positive) * len(negative))


def separation(
    model: PreTrainedModel,
    directions: Sequence[Direction],
    positive: Sequence[Span],
    negative: Sequence[Span],
) -> list[float]:
    """AUROC of each direction between two classes of spans. Each span is projected at its mean activation.

    >>> from probes import direction_between, load
    >>> from probes.evidence import separation
    >>> from probes.thinking import text_span
    >>> model = load("organism")
    >>> quick, plain = ([text_span(model, f"a {k} b +4{end}") for k in range(6)] for end in (" quick", ""))
    >>> direction = direction_between(model, ["a 7 quick"], ["a 7"], "L2.resid_post")
    >>> [round(score, 2) for score in separation(model, [direction, -direction], quick, plain)]
    [0.69, 0.31]
    """
    projections = project(model, [*positive, *negative], directions)
    return [auroc(row[: len(positive)], row[len(positive) :]) for row in projections]


def _contrast(labels: Bool[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Weights that take the mean of the positive less that of the negative."""
    return labels.double() / labels.sum(1, keepdim=True) - (~labels).double() / (~labels).sum(1, keepdim=True)


def _aurocs(values: Float[Tensor, "m n"], labels: Bool[Tensor, "m n"]) -> Float[Tensor, " m"]:
    """AUROC of each row, from ranks; ties count half."""
    ranks = torch.from_numpy(stats.rankdata(values.numpy(), axis=1)).double()
    above, below = labels.sum(1).double(), (~labels).sum(1).double()
    return ((ranks * labels).sum(1) - above * (above + 1) / 2) / (above * below)


def _shuffled(labels: Bool[Tensor, " n"], times: int, rng: torch.Generator) -> Bool[Tensor, "times n"]:
    return labels[torch.rand(times, len(labels), generator=rng).argsort(1)]


def _resampled(labels: Bool[Tensor, " n"], times: int, rng: torch.Generator) -> Float[Tensor, "times n"]:
    """Contrasts of samples drawn with replacement within each class."""
    weights = torch.zeros(times, len(labels), dtype=torch.float64)
    for value, sign in ((True, 1.0), (False, -1.0)):
        rows = (labels == value).nonzero()[:, 0]
        picks = rows[torch.randint(len(rows), (times, len(rows)), generator=rng)]
        weights.scatter_add_(1, picks, torch.full(picks.shape, sign / len(rows), dtype=torch.float64))
    return weights


def _range(values: Float[Tensor, " m"]) -> Range:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high
