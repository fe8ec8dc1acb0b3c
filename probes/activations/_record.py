"""Read activations and reduce them as they are read: per sequence, the mean over a span of positions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from probes.activations.moments import Moments
from probes.model.hooks import forward_through, hook_site
from probes.model.sites import Site
from probes.tables import Brief
from probes.thinking.spans import Span


def span_means(
    model: PreTrainedModel,
    spans: Sequence[Span],
    sites: Sequence[Site],
    *,
    batch_tokens: int = 16_384,
    label: str = "reading",
) -> Iterator[tuple[list[int], dict[Site, Float[Tensor, "batch width"]], dict[Site, Float[Tensor, " batch"]]]]:
    """Batch by batch: which spans, and per site the mean over each span of the activation and of its norm.

    Batches are cut by length and by a budget of tokens, padded on the right. Layers above the highest site are not
    computed, and nothing longer than a span's mean is kept. Raises what `probes.model.captured` does for a site that
    the model does not have.

    >>> from probes import Site, load
    >>> from probes.activations import span_means
    >>> from probes.thinking import text_span
    >>> model, site = load("organism"), Site(2, "resid_post")
    >>> spans = [text_span(model, text) for text in ("a 3 b +4", "a 5")]
    >>> for rows, means, norms in span_means(model, spans, [site]):
    ...     print(rows, tuple(means[site].shape), tuple(norms[site].shape))
    [0, 1] (2, 96) (2,)
    """
    top = max(site.layer for site in sites)
    with tqdm(total=len(spans), desc=label, unit="span", delay=2, leave=False) as bar:
        for rows in batches(spans, batch_tokens):
            batch = [spans[row] for row in rows]
            width = max(len(span.ids) for span in batch)
            ids = torch.tensor([[*s.ids, *[s.ids[-1]] * (width - len(s.ids))] for s in batch], device=model.device)
            places = torch.arange(width)
            real = places < torch.tensor([[len(s.ids)] for s in batch])
            wanted = (places >= torch.tensor([[s.start] for s in batch])) & (
                places < torch.tensor([[s.stop] for s in batch])
            )
            weights = wanted.float() / wanted.sum(1, keepdim=True)
            means: dict[Site, Tensor] = {}
            norms: dict[Site, Tensor] = {}
            with ExitStack() as stack:
                for site in sites:
                    stack.enter_context(hook_site(model, site, _reducer(site, weights, means, norms)))
                forward_through(model, top, ids, real.long().to(ids.device))
            yield rows, means, norms
            bar.update(len(rows))


@dataclass(frozen=True, repr=False)
class Recorded(Brief):
    """Moments over spans of a span's mean activation, and of its mean norm: each span counts once.

    >>> from probes import Site, load, record
    >>> from probes.thinking import text_span
    >>> model, site = load("organism"), Site(2, "resid_post")
    >>> one, other = (record(model, [text_span(model, text)], [site])[site] for text in ("a 3", "a 5"))
    >>> (one + other).activation
    Moments(count=2, total=Tensor[96])
    """

    activation: Moments
    norm: Moments

    def __add__(self, other: "Recorded") -> "Recorded":
        return Recorded(self.activation + other.activation, self.norm + other.norm)


def record(
    model: PreTrainedModel, spans: Sequence[Span], sites: Sequence[Site], *, label: str = "reading"
) -> dict[Site, Recorded]:
    """Per site, the moments over all spans, merged batch by batch: memory is O(sites x d_model).

    >>> from probes import Site, load, record
    >>> from probes.thinking import text_span
    >>> model, site = load("organism"), Site(2, "resid_post")
    >>> moments = record(model, [text_span(model, text) for text in ("a 3 b +4", "a 5")], [site])
    >>> moments[site].activation.mean.shape, f"{moments[site].norm.mean.item():.1f}"
    (torch.Size([96]), '40.7')
    """
    total: dict[Site, Recorded] = {}
    for _, means, norms in span_means(model, spans, sites, label=label):
        for site in sites:
            new = Recorded(Moments.of(means[site]), Moments.of(norms[site][:, None]))
            total[site] = total[site] + new if site in total else new
    return total


def _reducer(
    site: Site, weights: Tensor, means: dict[Site, Tensor], norms: dict[Site, Tensor]
) -> Callable[[Tensor], None]:
    def reduce_spans(x: Tensor) -> None:
        wide, w = x.float(), weights.to(x.device)
        means[site] = torch.einsum("bp,bpw->bw", w, wide)
        norms[site] = (w * wide.norm(dim=-1)).sum(1)

    return reduce_spans


def batches(spans: Sequence[Span], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of spans, longest first, at most `batch_tokens` padded tokens a batch."""
    order = sorted(range(len(spans)), key=lambda i: -len(spans[i].ids))
    while order:
        size = max(1, batch_tokens // len(spans[order[0]].ids))
        yield order[:size]
        order = order[size:]
