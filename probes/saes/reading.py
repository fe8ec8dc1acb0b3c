"""Latents read off a model's pass: batch by batch, encoded chunk by chunk, and reduced; no activation is kept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from probes.activations._record import batches, padded
from probes.activations.reduction import kept
from probes.model.hooks import forward_through, hook_sites
from probes.model.sites import Site
from probes.saes.sae import Autoencoder
from probes.thinking.spans import Span

CHUNK_BYTES = 64 << 20  # of latents that are held at once
BATCH_TOKENS = 4_096


@dataclass(frozen=True, eq=False)
class Read:
    """The activations of one text at a site, and which of its positions are read: real, asked for, and no sinks."""

    number: int
    x: Float[Tensor, "pos width"]
    used: Bool[Tensor, " pos"]


def streamed(
    model: PreTrainedModel,
    spans: Sequence[Span],
    site: Site,
    *,
    keep_sinks: bool = False,
    device: torch.device | None = None,
    label: str = "reading",
) -> Iterator[Read]:
    """Text by text, longest first, the activations at a site over its whole length, in float32, on `device` if given.

    Attention sinks are not `used`, unless `keep_sinks` (`probes.activations.span_means` says what they are).
    """
    for reads in streamed_at(model, spans, [site], keep_sinks=keep_sinks, device=device, label=label):
        yield reads[site]


def streamed_at(
    model: PreTrainedModel,
    spans: Sequence[Span],
    sites: Sequence[Site],
    *,
    keep_sinks: bool = False,
    device: torch.device | None = None,
    label: str = "reading",
) -> Iterator[dict[Site, Read]]:
    """As `streamed`, for several sites in one pass."""
    top, caught = max(site.layer for site in sites), dict[Site, Tensor]()
    with tqdm(total=len(spans), desc=label, unit="text", delay=2, leave=False) as bar:
        for rows in batches(model, spans, BATCH_TOKENS):
            ids, real = padded([spans[row].ids for row in rows])
            with hook_sites(model, {site: partial(_catch, caught, site) for site in sites}), torch.no_grad():
                forward_through(model, top, ids.to(model.device), real.long().to(model.device))
            wanted = torch.zeros_like(real)
            for i, row in enumerate(rows):
                wanted[i, spans[row].start : spans[row].stop] = True
            held = {
                site: (x.to(device), _used(x, wanted, real, site, keep_sinks).to(device)) for site, x in caught.items()
            }
            caught.clear()
            for i, row in enumerate(rows):
                n = len(spans[row].ids)
                # a view would keep the batch beside the next
                yield {site: Read(row, x[i, :n].clone(), used[i, :n].clone()) for site, (x, used) in held.items()}
            held.clear()
            bar.update(len(rows))


def _catch(caught: dict[Site, Tensor], site: Site, x: Tensor) -> None:
    caught[site] = x.detach().float()


def _used(
    x: Float[Tensor, "batch pos width"],
    wanted: Bool[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
    site: Site,
    keep_sinks: bool,
) -> Bool[Tensor, "batch pos"]:
    wanted, real = wanted.to(x.device), real.to(x.device)
    return wanted if keep_sinks else kept(x, x.norm(dim=-1), wanted, real, site)


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Of one text and each class of its positions: how many there are, and of every latent the sum, how often it is
    active, and the largest activation."""

    number: int
    count: Int[Tensor, " classes"]
    total: Float[Tensor, "classes d_sae"]
    active: Float[Tensor, "classes d_sae"]
    largest: Float[Tensor, "classes d_sae"]

    @property
    def mean(self) -> Float[Tensor, "classes d_sae"]:
        return self.total / self.count[:, None].clamp(min=1)


@torch.no_grad()
def class_moments(
    model: PreTrainedModel,
    sae: Autoencoder,
    spans: Sequence[Span],
    classes: Sequence[Bool[Tensor, "_ _"]],
    *,
    keep_sinks: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    label: str = "reading latents",
) -> Iterator[ClassMoments]:
    """Text by text, what every latent does in each class of positions.

    A position may be in several classes, or in none. At most `chunk_bytes` of latents are held at once.
    """
    step = max(1, chunk_bytes // (4 * sae.d_sae))
    device = sae.decoder.device
    for read in streamed(model, spans, sae.site, keep_sinks=keep_sinks, device=device, label=label):
        masks = classes[read.number].to(read.x.device) & read.used
        n = len(masks)
        total, active, largest = (torch.zeros(n, sae.d_sae, device=read.x.device) for _ in range(3))
        for start in range(0, len(read.x), step):
            part = masks[:, start : start + step]
            at = part.any(0)
            if not at.any():
                continue
            x, own = read.x[start : start + step][at], part[:, at]
            f = sae.encode(x)
            total += own.float() @ f
            active += own.float() @ (f > 0).float()
            for i, mask in enumerate(own):
                if mask.any():
                    largest[i] = torch.maximum(largest[i], f[mask].amax(0))
            del f  # or it would lie beside the model's next pass
        yield ClassMoments(read.number, masks.sum(1), total, active, largest)
