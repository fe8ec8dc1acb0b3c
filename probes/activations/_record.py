"""Read activations and reduce them as they are read: per sequence, the mean over a span of positions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from probes.activations.moments import Moments
from probes.activations.reduction import Block, Reduction
from probes.model.hooks import forward_through, hook_sites
from probes.model.positions import check_room, rope_groups
from probes.model.sites import Site
from probes.tables import Brief
from probes.thinking.spans import Span

BATCH_TOKENS = 16_384


@dataclass(frozen=True, repr=False)
class SpanBatch(Brief):
    """What was read of some spans, `rows` of those asked for: per site, the mean over each span of the activation and
    of its norm; how many of its positions were left out as sinks; and the largest share of the sum of its norms that
    one position holds, left out or not.

    >>> from probes import Site, load
    >>> from probes.activations import span_means
    >>> from probes.thinking import text_span
    >>> model, site = load("organism"), Site(2, "resid_post")
    >>> (batch,) = span_means(model, [text_span(model, text) for text in ("a 3 b +4", "a 5")], [site])
    >>> batch.rows, batch.means[site].shape, batch.left_out[site].tolist()
    ([0, 1], torch.Size([2, 96]), [1, 1])
    """

    rows: list[int]
    means: dict[Site, Float[Tensor, "batch width"]]
    norms: dict[Site, Float[Tensor, " batch"]]
    left_out: dict[Site, Int[Tensor, " batch"]]
    shares: dict[Site, Float[Tensor, " batch"]]


def span_means(
    model: PreTrainedModel,
    spans: Sequence[Span],
    sites: Sequence[Site],
    *,
    keep_sinks: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    label: str = "reading",
) -> Iterator[SpanBatch]:
    """Batch by batch, the mean over each span of the activation and of its norm at each site.

    Attention sinks are left out of the means, unless `keep_sinks`: the first position of a sequence, and those of the
    residual stream whose norm is more than 3 times the median of their sequence and is held, for more than half of its
    square, by one coordinate. They carry a large constant, which says nothing of the text (Sun et al. 2024, Massive
    Activations; Xiao et al. 2024, StreamingLLM); a norm that is large in many coordinates is kept. A span that holds
    nothing else is read as it is. A sequence is read once, however many spans it has. Batches are cut by length and by
    a budget of tokens, padded on the right. Layers above the highest site are not computed, and nothing longer than a
    span's mean is kept. An empty `label` shows no bar. Raises what `probes.model.captured` does for a site that the
    model does not have.

    >>> from probes import Site, load
    >>> from probes.activations import span_means
    >>> from probes.thinking import text_span
    >>> model, site = load("organism"), Site(2, "resid_post")
    >>> spans = [text_span(model, text) for text in ("a 3 b +4", "a 5")]
    >>> for batch in span_means(model, spans, [site]):
    ...     print(batch.rows, tuple(batch.means[site].shape), tuple(batch.norms[site].shape))
    [0, 1] (2, 96) (2,)
    """
    for rows, blocks in _read(model, spans, sites, keep_sinks=keep_sinks, batch_tokens=batch_tokens, label=label):
        read = SpanBatch(rows, {}, {}, {}, {})
        for block in blocks:
            for i, site in enumerate(block.sites):
                read.means[site], read.norms[site] = block.means[i], block.norms[i]
                read.left_out[site], read.shares[site] = block.left_out[i], block.shares[i]
        yield read


def _read(
    model: PreTrainedModel,
    spans: Sequence[Span],
    sites: Sequence[Site],
    *,
    keep_sinks: bool,
    batch_tokens: int,
    label: str,
) -> Iterator[tuple[list[int], list[Block]]]:
    """Batch by batch, the numbers of the spans that were read, and what was."""
    top = max(site.layer for site in sites)
    owners: dict[tuple[int, ...], list[int]] = {}
    for number, span in enumerate(spans):
        owners.setdefault(span.ids, []).append(number)
    texts = [spans[numbers[0]] for numbers in owners.values()]
    reduction = Reduction(keep_sinks=keep_sinks)
    with tqdm(total=len(spans), desc=label, unit="span", delay=2, leave=False, disable=not label) as bar:
        for rows in batches(model, texts, batch_tokens):
            own = [owners[texts[row].ids] for row in rows]
            ids, real = padded([texts[row].ids for row in rows])
            reduction.begin([[spans[number] for number in numbers] for numbers in own], real)
            with hook_sites(model, {site: reduction.at(site) for site in sites}):
                forward_through(model, top, ids.to(model.device), real.long().to(model.device))
            read = [number for numbers in own for number in numbers]
            yield read, reduction.finish()
            bar.update(len(read))


def padded(rows: Sequence[tuple[int, ...]]) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Rows filled up on the right, and which of their positions are real."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])
    return ids, torch.arange(width) < torch.tensor([[len(row)] for row in rows])


@dataclass(frozen=True, repr=False)
class Recorded(Brief):
    """Moments over spans of a span's mean activation, and of its mean norm: each span counts once.

    `left_out` counts the positions that were left out as sinks; `share` holds the moments of the largest share of a
    span's norm that one position holds, over the spans of more than one.

    >>> from probes import Site, load, record
    >>> from probes.thinking import text_span
    >>> model, site = load("organism"), Site(2, "resid_post")
    >>> one, other = (record(model, [text_span(model, text)], [site])[site] for text in ("a 3", "a 5"))
    >>> (one + other).activation, (one + other).left_out
    (Moments(count=2, total=Tensor[96]), 2)
    """

    activation: Moments
    norm: Moments
    left_out: int
    share: Moments

    def __add__(self, other: "Recorded") -> "Recorded":
        return Recorded(
            self.activation + other.activation,
            self.norm + other.norm,
            self.left_out + other.left_out,
            self.share + other.share,
        )


def record(
    model: PreTrainedModel,
    spans: Sequence[Span],
    sites: Sequence[Site],
    *,
    keep_sinks: bool = False,
    label: str = "reading",
) -> dict[Site, Recorded]:
    """Per site, the moments over all spans, merged batch by batch: memory is O(sites x d_model).

    Attention sinks are left out unless `keep_sinks`, as `span_means` says. An empty `label` shows no bar.

    >>> from probes import Site, load, record
    >>> from probes.thinking import text_span
    >>> model, site = load("organism"), Site(2, "resid_post")
    >>> moments = record(model, [text_span(model, text) for text in ("a 3 b +4", "a 5")], [site])
    >>> moments[site].activation.mean.shape, f"{moments[site].norm.mean.item():.1f}"
    (torch.Size([96]), '55.8')
    """
    several = torch.tensor([span.stop - span.start > 1 for span in spans])
    sums: dict[tuple[Site, ...], tuple[Any, ...]] = {}
    for rows, blocks in _read(model, spans, sites, keep_sinks=keep_sinks, batch_tokens=BATCH_TOKENS, label=label):
        at = several[rows].nonzero()[:, 0]
        for block in blocks:
            n, means, norms = len(rows), block.means.double().sum(1), block.norms.double().sum(1)
            shares = block.shares[:, at.to(block.shares.device)].double().sum(1)
            new = (n, len(at), means, norms, block.left_out.sum(1), shares)
            old = sums.get(block.sites)
            sums[block.sites] = new if old is None else tuple(a + b for a, b in zip(old, new, strict=True))
    total: dict[Site, Recorded] = {}
    for block_sites, (n, n_several, means, norms, left_out, shares) in sums.items():
        columns = (means.unbind(), norms[:, None].unbind(), left_out.tolist(), shares[:, None].cpu().unbind())
        for site, mean, norm, left, share in zip(block_sites, *columns, strict=True):
            read = Recorded(Moments(n, mean), Moments(n, norm), left, Moments(n_several, share))
            total[site] = total[site] + read if site in total else read
    return {site: total[site] for site in sites}


def batches(model: PreTrainedModel, spans: Sequence[Span], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of spans that may be read together, longest first, at most `batch_tokens` padded tokens a batch."""
    lengths = [len(span.ids) for span in spans]
    check_room(model, max(lengths, default=0))
    for group in rope_groups(model, lengths):
        yield from cut(group, lengths, batch_tokens)


def cut(rows: Iterable[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows, longest first, in batches of at most `batch_tokens` tokens once they are padded; one row at least."""
    order = sorted(rows, key=lambda i: -lengths[i])
    while order:
        size = max(1, batch_tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]
