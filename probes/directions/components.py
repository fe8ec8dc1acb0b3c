"""The principal components of what a site holds, and a direction's part within them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from probes.activations.reduction import kept
from probes.directions.direction import Direction
from probes.model.hooks import captured, forward_through
from probes.model.sites import Site
from probes.thinking.spans import Span


@torch.no_grad()
def principal_components(
    model: PreTrainedModel, spans: Sequence[Span], site: Site, k: int = 10
) -> tuple[Float[Tensor, "k width"], float]:
    """The top k principal components of the activations at all positions of the spans, orthonormal, and their share of
    the variance.

    Attention sinks are left out, as by `probes.activations.span_means`. Streams: what is kept is a mean and a [width,
    width] second moment, in float64. Raises ValueError where there are fewer than k + 1 positions or k is more than the
    width.

    >>> from probes import Site, load
    >>> from probes.directions import principal_components
    >>> from probes.thinking import text_span
    >>> model = load("organism")
    >>> spans = [text_span(model, text) for text in ("a 3 b +4", "a 5 b -2 c +9")]
    >>> components, share = principal_components(model, spans, Site(2, "resid_post"), k=3)
    >>> components.shape, f"{share:.2f}"
    (torch.Size([3, 96]), '0.95')
    """
    count, total, second = 0, torch.zeros(0), torch.zeros(0)
    for span in tqdm(spans, desc="principal components", unit="span", delay=2, leave=False):
        ids = torch.tensor([span.ids[: span.stop]], device=model.device)
        with captured(model, [site]) as cache:
            forward_through(model, site.layer, ids, torch.ones_like(ids))
        x = cache[site][0].double()
        wanted = torch.zeros(1, len(x), dtype=torch.bool, device=x.device)
        wanted[0, span.start : span.stop] = True
        rows = x[kept(x[None], x.norm(dim=-1)[None], wanted, torch.ones_like(wanted), site)[0]]
        if not count:
            total, second = rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1], rows.shape[1])
        count, total, second = count + len(rows), total + rows.sum(0), second + rows.T @ rows
    width = len(total)
    if not 0 < k <= min(width, count - 1):
        raise ValueError(
            f"{k} principal components are asked for, of {count} positions of width {width} at {site}: ask for at most "
            f"{max(0, min(width, count - 1))}, or give more spans."
        )
    mean = total / count
    values, vectors = torch.linalg.eigh(second / count - torch.outer(mean, mean))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    return vectors[:, :k].T.float().cpu(), float(values[:k].sum() / values.sum())


def on_manifold(direction: Direction, components: Float[Tensor, "k width"]) -> Direction:
    """The direction's part in the span of orthonormal components: U Uᵀ v (Huang et al. 2025, Manifold Steering).

    Their paper then scales it to norm 1; here it keeps its length, and `.unit` is theirs.

    >>> from probes import direction_between, load
    >>> from probes.directions import on_manifold, principal_components
    >>> from probes.thinking import text_span
    >>> model = load("organism")
    >>> direction = direction_between(model, ["a 3 quick"], ["a 3"], "L2.resid_post")
    >>> components, _ = principal_components(model, [text_span(model, "a 3 b +4 quick")], direction.site, k=3)
    >>> part = on_manifold(direction, components)
    >>> part.norm < direction.norm, part.provenance.estimator
    (True, 'difference in means, projected on 3 principal components')
    """
    part = components.T @ (components @ direction.vector)
    birth = direction.provenance
    provenance = birth.made(f"{birth.estimator}, projected on {len(components)} principal components")
    return replace(direction, vector=part, provenance=provenance)
