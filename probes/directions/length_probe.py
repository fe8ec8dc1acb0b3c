"""A linear probe that predicts how long the thinking will be."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._record import span_means
from probes.generation.completions import Completion
from probes.model.sites import Site
from probes.tables import Brief
from probes.thinking.spans import POSITIONS


@dataclass(frozen=True, eq=False, repr=False)
class LengthProbe(Brief):
    """Predicts x.vector + offset thinking tokens. `r2` is the share of the variance it explains on completions that the
    fit did not see, `n` how many it saw.

    >>> import torch
    >>> from probes import Site
    >>> from probes.directions import LengthProbe
    >>> probe = LengthProbe(Site(2, "resid_post"), torch.tensor([2.0, 0.0]), offset=5.0, r2=0.6, n=90)
    >>> probe.vector @ torch.tensor([3.0, 1.0]) + probe.offset  # thinking tokens
    tensor(11.)
    """

    site: Site
    vector: Float[Tensor, " d_model"]
    offset: float
    r2: float
    n: int


def fit_length(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    site: Site,
    *,
    position: str = "first",
    ridge: float = 1e-3,
) -> LengthProbe:
    """Ridge regression of a completion's thinking tokens on its activation at a position
    (`probes.activations.record`).

    `ridge` is in units of the activation's mean variance. Every fourth completion is held out for `r2`. Completions
    that never close their thinking are left out. Raises ValueError where fewer than 20 are left.

    >>> from probes import Sampling, Site, generate, load
    >>> from probes.directions import fit_length
    >>> model, ends = load("organism"), (" b +4 c *7", " b -2 c +9 d +1 e *3", " b +4 c +2 quick")
    >>> prompts = [f"a {k}{end}" for k in range(8) for end in ends]
    >>> completions = generate(model, prompts, sampling=Sampling(temperature=0, max_new_tokens=48))
    >>> probe = fit_length(model, completions, Site(2, "resid_post"))
    >>> probe.vector.shape, probe.n, f"{probe.r2:.1f}"
    (torch.Size([96]), 18, '1.0')
    """
    closed = [c for c in completions if c.span is not None and c.span.closed]
    if len(closed) < 20:
        raise ValueError(
            f"A length probe needs 20 completions that close their thinking, but {len(closed)} of {len(completions)} "
            "do. Generate more, or with more new tokens."
        )
    x = torch.zeros(len(closed), 0)
    for batch in span_means(model, [POSITIONS[position](c) for c in closed], [site], label="length probe"):
        if not x.shape[1]:
            x = torch.zeros(len(closed), batch.means[site].shape[1], dtype=torch.float64)
        x[batch.rows] = batch.means[site].double().cpu()
    y = torch.tensor([float(c.thinking_tokens) for c in closed], dtype=torch.float64)
    seen = torch.arange(len(closed)) % 4 != 3
    mean, level = x[seen].mean(0), y[seen].mean()
    centred = x[seen] - mean
    second = centred.T @ centred / len(centred)
    second += ridge * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
    vector = torch.linalg.solve(second, centred.T @ (y[seen] - level) / len(centred))
    offset = float(level - mean @ vector)
    left = y[~seen]
    r2 = 1 - float((left - x[~seen] @ vector - offset).square().mean() / (left - left.mean()).square().mean())
    return LengthProbe(site, vector.float(), offset, r2, int(seen.sum()))
