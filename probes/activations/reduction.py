"""Activations of several layers reduced together: over each span the mean, without attention sinks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.model.sites import Site
from probes.thinking.spans import Span

SINK = 3.0
"""A position of the stream whose norm is more than so many medians of its sequence's, and of whose squared norm one
coordinate holds more than half, is an attention sink."""
TOGETHER = 2**22  # bytes in float32: smaller activations wait for each other; starting an operation costs more
STREAM = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True)
class Block:
    """What was read at several sites of one width: a row for each site, and in it one for each span."""

    sites: tuple[Site, ...]
    means: Float[Tensor, "sites spans width"]
    norms: Float[Tensor, "sites spans"]
    left_out: Int[Tensor, "sites spans"]
    shares: Float[Tensor, "sites spans"]


class Reduction:
    """Activations that are seen site by site as a forward pass comes by, and reduced in blocks, batch after batch."""

    def __init__(self, *, keep_sinks: bool) -> None:
        self.keep_sinks = keep_sinks
        self.waiting: dict[tuple[object, ...], list[_Held]] = {}

    def begin(self, spans: Sequence[Sequence[Span]], real: Bool[Tensor, "batch pos"]) -> None:
        """A batch, and the spans of each of its rows.

        Rows have as many spans as the one with most: their first fills up. `there` is where, in rows and spans laid end
        to end, those are that were asked for.
        """
        most = max(map(len, spans))
        filled = [[*own, *[own[0]] * (most - len(own))] for own in spans]
        starts, stops = (torch.tensor([[getattr(s, end) for s in own] for own in filled]) for end in ("start", "stop"))
        places = torch.arange(real.shape[1])
        self.real, self.wanted = real, (places >= starts[..., None]) & (places < stops[..., None])
        self.there = torch.tensor([most * row + i for row, own in enumerate(spans) for i in range(len(own))])
        self.blocks: list[Block] = []

    def at(self, site: Site) -> Callable[[Tensor], None]:
        return lambda x: self.see(site, x)

    def see(self, site: Site, x: Float[Tensor, "batch pos width"]) -> None:
        """A large activation is reduced at once; a small one waits, which nothing may write into meanwhile."""
        x = x.float()
        held = self.waiting.setdefault((x.shape[-1], x.device, site.name in STREAM), [])
        held.append(_Held(site, x, x._version, norms_of(x)))
        if len(held) >= TOGETHER // (4 * x.numel()):
            self.reduce(held)

    def finish(self) -> list[Block]:
        for held in self.waiting.values():
            if held:
                self.reduce(held)
        return self.blocks

    def reduce(self, held: list["_Held"]) -> None:
        """What waits becomes a block. Raises ValueError where it was overwritten."""
        if any(one.x._version != one.version for one in held):
            sites = ", ".join(str(one.site) for one in held if one.x._version != one.version)
            raise ValueError(f"What the model computed at {sites} was overwritten in place before it was read.")
        device = held[0].x.device
        real, wanted, there = (tensor.to(device) for tensor in (self.real, self.wanted, self.there))
        norms = torch.stack([one.norms for one in held])
        each = norms[..., None, :] * wanted
        if self.keep_sinks:
            chosen = wanted.expand(each.shape)
        else:
            chosen = kept(lambda: torch.stack([largest(one.x) for one in held]), norms, wanted, real, held[0].site)
        weights = chosen.float() / chosen.sum(-1, keepdim=True)
        self.blocks.append(
            Block(
                tuple(one.site for one in held),
                means=torch.stack([w @ one.x for w, one in zip(weights, held, strict=True)]).flatten(1, 2)[:, there],
                norms=(weights * norms[..., None, :]).sum(-1).flatten(1)[:, there],
                left_out=(wanted.sum(-1) - chosen.sum(-1)).flatten(1)[:, there],
                shares=(each.amax(-1) / each.sum(-1)).flatten(1)[:, there],
            )
        )
        held.clear()


class _Held(NamedTuple):
    """An activation that waits, and the count of writes into its memory when it was seen."""

    site: Site
    x: Float[Tensor, "batch pos width"]
    version: int
    norms: Float[Tensor, "batch pos"]


def norms_of(x: Float[Tensor, "*rows width"]) -> Float[Tensor, " *rows"]:
    """Euclidean, by a product of matrices: faster than a sum over a short dimension."""
    return (x.square() @ x.new_ones(x.shape[-1])).sqrt()


def largest(x: Float[Tensor, "*rows width"]) -> Float[Tensor, " *rows"]:
    """Of absolute values, without a copy of them."""
    return torch.maximum(x.amax(-1), -x.amin(-1))


def kept(
    peaks: Callable[[], Float[Tensor, "*sites batch pos"]],
    norms: Float[Tensor, "*sites batch pos"],
    wanted: Bool[Tensor, "batch *spans pos"],
    real: Bool[Tensor, "batch pos"],
    site: Site,
) -> Bool[Tensor, "..."]:
    """Those of the `wanted` positions that are no attention sinks; all where none is left. `norms` are those of what is
    read, and `peaks` gives its largest absolute values, where they matter."""
    sink = torch.zeros_like(norms, dtype=torch.bool)
    sink[..., 0] = True
    if site.name in STREAM:  # elsewhere a norm far above the others is no constant
        median = norms.masked_fill(~real, torch.nan).nanmedian(-1, keepdim=True).values
        far = norms > SINK * median
        if not far.is_cpu or far.any():  # few texts have one, but to ask elsewhere would be to wait
            sink |= far & (peaks().square() > norms.square() / 2)
    left = wanted & ~(sink[..., None, :] if wanted.ndim > real.ndim else sink)
    return left.where(left.any(-1, keepdim=True), wanted)
