"""Activations of several layers reduced together: over each span the mean, without attention sinks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

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
        self.waiting: dict[tuple[object, ...], _Waiting] = {}

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
        """A large activation is reduced at once; a small one is copied, as the next layer may write into it."""
        room = TOGETHER // (4 * x.numel())
        if room < 2:
            self.reduce([site], x.float()[None])
            return
        kind = (x.shape[-1], x.device, site.name in STREAM)
        if kind not in self.waiting:
            self.waiting[kind] = _Waiting(torch.empty(TOGETHER // 4, device=x.device))
        held = self.waiting[kind]
        held.hold(site, x)
        if len(held.sites) == room:
            self.reduce(*held.take())

    def finish(self) -> list[Block]:
        for held in self.waiting.values():
            if held.sites:
                self.reduce(*held.take())
        return self.blocks

    def reduce(self, sites: Sequence[Site], x: Float[Tensor, "sites batch pos width"]) -> None:
        real, wanted, there = (tensor.to(x.device) for tensor in (self.real, self.wanted, self.there))
        norms = x.norm(dim=-1)
        held = norms[..., None, :] * wanted
        chosen = wanted.expand(held.shape) if self.keep_sinks else kept(x, norms, wanted, real, sites[0])
        weights = chosen.float() / chosen.sum(-1, keepdim=True)
        self.blocks.append(
            Block(
                tuple(sites),
                means=(weights @ x).flatten(1, 2)[:, there],
                norms=(weights * norms[..., None, :]).sum(-1).flatten(1)[:, there],
                left_out=(wanted.sum(-1) - chosen.sum(-1)).flatten(1)[:, there],
                shares=(held.amax(-1) / held.sum(-1)).flatten(1)[:, there],
            )
        )


@dataclass
class _Waiting:
    """Room for activations of one width, laid end to end."""

    room: Float[Tensor, " numbers"]
    shape: tuple[int, ...] = ()
    sites: list[Site] = field(default_factory=list)

    def hold(self, site: Site, x: Float[Tensor, "batch pos width"]) -> None:
        self.shape = tuple(x.shape)
        start = len(self.sites) * x.numel()
        self.room[start : start + x.numel()].view(x.shape).copy_(x)
        self.sites.append(site)

    def take(self) -> tuple[list[Site], Float[Tensor, "sites batch pos width"]]:
        sites, self.sites = self.sites, []
        return sites, self.room[: len(sites) * prod(self.shape)].view(len(sites), *self.shape)


def kept(
    x: Float[Tensor, "*sites batch pos width"],
    norms: Float[Tensor, "*sites batch pos"],
    wanted: Bool[Tensor, "batch *spans pos"],
    real: Bool[Tensor, "batch pos"],
    site: Site,
) -> Bool[Tensor, "..."]:
    """Those of the `wanted` positions that are no attention sinks; all where none is left. `norms` are those of x, and
    what is returned has its leading dimensions."""
    sink = torch.zeros_like(norms, dtype=torch.bool)
    sink[..., 0] = True
    if site.name in STREAM:  # elsewhere a norm far above the others is no constant
        median = norms.masked_fill(~real, torch.nan).nanmedian(-1, keepdim=True).values
        far = norms > SINK * median
        if not far.is_cpu or far.any():  # few texts have one, but to ask elsewhere would be to wait
            largest = torch.maximum(x.amax(-1), -x.amin(-1))  # of absolute values, without a copy of them
            sink |= far & (largest.square() > norms.square() / 2)
    left = wanted & ~(sink[..., None, :] if wanted.ndim > real.ndim else sink)
    return left.where(left.any(-1, keepdim=True), wanted)
