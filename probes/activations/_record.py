"""Read activations and reduce them as they are read: per sequence, the mean over a span of positions."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from probes.activations.moments import Moments
from probes.model.architectures import check_room, rope_groups
from probes.model.hooks import forward_through, hook_site
from probes.model.sites import Site
from probes.tables import Brief
from probes.thinking.spans import Span

SINK = 3.0
"""A position of the stream whose norm is more than so many medians of its sequence's, and of whose squared norm one
coordinate holds more than half, is an attention sink."""


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
    batch_tokens: int = 16_384,
    label: str = "reading",
) -> Iterator[SpanBatch]:
    """Batch by batch, the mean over each span of the activation and of its norm at each site.

    Attention sinks are left out of the means, unless `keep_sinks`: the first position of a sequence, and those of the
    residual stream whose norm is more than 3 times the median of their sequence and is held, for more than half of its
    square, by one coordinate. They carry a large constant, which says nothing of the text (Sun et al. 2024, Massive
    Activations; Xiao et al. 2024, StreamingLLM); a norm that is large in many coordinates is kept. A span that holds
    nothing else is read as it is. A sequence is read once, however many spans it has. Batches are cut by length and by
    a budget of tokens, padded on the right. Layers above the highest site are not computed, and nothing longer than a
    span's mean is kept. Raises what `probes.model.captured` does for a site that the model does not have.

    >>> from probes import Site, load
    >>> from probes.activations import span_means
    >>> from probes.thinking import text_span
    >>> model, site = load("organism"), Site(2, "resid_post")
    >>> spans = [text_span(model, text) for text in ("a 3 b +4", "a 5")]
    >>> for batch in span_means(model, spans, [site]):
    ...     print(batch.rows, tuple(batch.means[site].shape), tuple(batch.norms[site].shape))
    [0, 1] (2, 96) (2,)
    """
    top = max(site.layer for site in sites)
    owners: dict[tuple[int, ...], list[int]] = {}
    for number, span in enumerate(spans):
        owners.setdefault(span.ids, []).append(number)
    texts = [spans[numbers[0]] for numbers in owners.values()]
    with tqdm(total=len(spans), desc=label, unit="span", delay=2, leave=False) as bar:
        for rows in batches(model, texts, batch_tokens):
            own = [owners[texts[row].ids] for row in rows]
            ids, real = _padded([texts[row].ids for row in rows])
            wanted, there = _wanted([[spans[number] for number in numbers] for numbers in own], ids.shape[1])
            read = SpanBatch([number for numbers in own for number in numbers], {}, {}, {}, {})
            with ExitStack() as stack:
                for site in sites:
                    reduce_spans = partial(
                        _reduce, site=site, real=real, wanted=wanted, there=there, keep=keep_sinks, into=read
                    )
                    stack.enter_context(hook_site(model, site, reduce_spans))
                forward_through(model, top, ids.to(model.device), real.long().to(model.device))
            yield read
            bar.update(len(read.rows))


def _padded(rows: Sequence[tuple[int, ...]]) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Rows filled up on the right, and which of their positions are real."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])
    return ids, torch.arange(width) < torch.tensor([[len(row)] for row in rows])


def _wanted(
    spans: Sequence[Sequence[Span]], width: int
) -> tuple[Bool[Tensor, "batch spans pos"], Int[Tensor, " all_spans"]]:
    """The positions of each row's spans, of which rows have as many as the one with most: their first fills up. And
    where, in rows and spans laid end to end, those are that were asked for."""
    most = max(map(len, spans))
    filled = [[*own, *[own[0]] * (most - len(own))] for own in spans]
    starts, stops = (torch.tensor([[getattr(s, end) for s in own] for own in filled]) for end in ("start", "stop"))
    places = torch.arange(width)
    there = [most * row + i for row, own in enumerate(spans) for i in range(len(own))]
    return (places >= starts[..., None]) & (places < stops[..., None]), torch.tensor(there)


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

    Attention sinks are left out unless `keep_sinks`, as `span_means` says.

    >>> from probes import Site, load, record
    >>> from probes.thinking import text_span
    >>> model, site = load("organism"), Site(2, "resid_post")
    >>> moments = record(model, [text_span(model, text) for text in ("a 3 b +4", "a 5")], [site])
    >>> moments[site].activation.mean.shape, f"{moments[site].norm.mean.item():.1f}"
    (torch.Size([96]), '55.8')
    """
    total: dict[Site, Recorded] = {}
    several = torch.tensor([span.stop - span.start > 1 for span in spans])
    for batch in span_means(model, spans, sites, keep_sinks=keep_sinks, label=label):
        for site in sites:
            shares = batch.shares[site].cpu()[several[batch.rows]]
            new = Recorded(
                Moments.of(batch.means[site]),
                Moments.of(batch.norms[site][:, None]),
                int(batch.left_out[site].sum()),
                Moments.of(shares[:, None]),
            )
            total[site] = total[site] + new if site in total else new
    return total


def kept(
    x: Float[Tensor, "batch pos width"],
    norms: Float[Tensor, "batch pos"],
    wanted: Bool[Tensor, "batch *spans pos"],
    real: Bool[Tensor, "batch pos"],
    site: Site,
) -> Bool[Tensor, "batch *spans pos"]:
    """Those of the `wanted` positions that are no attention sinks; all where none is left. `norms` are those of x."""
    sink = torch.zeros_like(real)
    sink[:, 0] = True
    if site.name in ("resid_pre", "resid_mid", "resid_post"):  # elsewhere a norm far above the others is no constant
        median = norms.masked_fill(~real, torch.nan).nanmedian(1, keepdim=True).values
        sink |= (norms > SINK * median) & (x.abs().amax(-1).square() > norms.square() / 2)
    left = wanted & ~(sink if wanted.ndim == sink.ndim else sink[:, None])
    return left.where(left.any(-1, keepdim=True), wanted)


def _reduce(x: Tensor, *, site: Site, real: Tensor, wanted: Tensor, there: Tensor, keep: bool, into: SpanBatch) -> None:
    wide, real, wanted, there = x.float(), real.to(x.device), wanted.to(x.device), there.to(x.device)
    norms = wide.norm(dim=-1)
    held = norms[:, None] * wanted
    chosen = wanted if keep else kept(wide, norms, wanted, real, site)
    weights = chosen.float() / chosen.sum(-1, keepdim=True)
    into.means[site] = (weights @ wide).flatten(0, 1)[there]
    into.norms[site] = (weights * norms[:, None]).sum(-1).flatten()[there]
    into.left_out[site] = (wanted.sum(-1) - chosen.sum(-1)).flatten()[there]
    into.shares[site] = (held.amax(-1) / held.sum(-1)).flatten()[there]


def batches(model: PreTrainedModel, spans: Sequence[Span], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of spans that may be read together, longest first, at most `batch_tokens` padded tokens a batch."""
    lengths = [len(span.ids) for span in spans]
    check_room(model, max(lengths, default=0))
    for group in rope_groups(model, lengths):
        order = sorted(group, key=lambda i: -lengths[i])
        while order:
            size = max(1, batch_tokens // lengths[order[0]])
            yield order[:size]
            order = order[size:]
