"""How well a direction tells two classes apart, on completions it has not seen."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import mannwhitneyu
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations import Span, span_means
from probes.directions import Direction


def project(
    model: PreTrainedModel, spans: Sequence[Span], directions: Sequence[Direction]
) -> Float[Tensor, "n_directions n"]:
    """Projection of each span's mean activation on each direction's unit vector."""
    out = torch.empty(len(directions), len(spans), dtype=torch.float64)
    sites = list({direction.site for direction in directions})
    for rows, means, _ in span_means(model, spans, sites, label="projecting"):
        for i, direction in enumerate(directions):
            mean = means[direction.site]
            out[i, rows] = (mean @ direction.unit.to(mean.device)).double().cpu()
    return out


def auroc(positive: Float[Tensor, " n"], negative: Float[Tensor, " m"]) -> float:
    """The chance that a positive value is above a negative one; ties count half."""
    u = mannwhitneyu(np.asarray(positive), np.asarray(negative)).statistic
    return float(u) / (len(positive) * len(negative))


def separation(
    model: PreTrainedModel,
    directions: Sequence[Direction],
    positive: Sequence[Span],
    negative: Sequence[Span],
) -> list[float]:
    """AUROC of each direction between two classes of spans."""
    projections = project(model, [*positive, *negative], directions)
    return [auroc(row[: len(positive)], row[len(positive) :]) for row in projections]
