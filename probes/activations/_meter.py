"""Chains of thought that are followed pass by pass: what their trajectories are made of, in constant memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from probes.model.architectures import architecture_of, sites_in, width_of
from probes.model.hooks import hook_sites
from probes.model.passes import hooked
from probes.rows import Remembered, Rows
from probes.tables import Brief
from probes.thinking.phases import Clock, Phases
from probes.words import checked

Norm = Literal["code", "paper"]
Left = Callable[[Sequence[int], "list[Trajectory]"], None]


@dataclass(frozen=True, repr=False)
class Trajectory(Brief):
    """What the stream did over the thinking of one chain *(Vilas et al. 2025, Tracing the Traces)*.

    The thinking is cut into segments of `segment` tokens, the last one shorter, and h(n), n = 1..N, is the mean of a
    segment's activations. Of each layer: `net` = ‖h(N) - h(1)‖ / (N-1); `cumulative` = the sum over n of
    ‖h(n) - h(n-1)‖; `aligned` = the mean over n of cos(h(n) - h(n-1), h(N) - h(1)), where a segment that does not move
    counts 0. All three are NaN for fewer than two segments; for two, cumulative is net and aligned is 1. `steps` holds
    net and cumulative as they stood after each of the first steps. `magnitude` and `angle` are changes from layer to
    layer over that from the first to the last, means over layers and segments *(Wang et al. 2024)*.

    Layers are the outputs of the blocks, the last one's after the final norm, as transformers' `hidden_states[1:]` are.
    Scales differ between layers, and a mean over them is mostly that of the last ones: the layers are kept.

    >>> from probes import generate, load
    >>> from probes.activations import read_trajectories
    >>> model = load("organism")
    >>> (found,) = read_trajectories(model, generate(model, ["a 3 b +4 c *7"]), segment=3)
    >>> found.tokens, found.segments, found.net.shape
    (11, 4, torch.Size([4]))
    >>> {name: round(value, 2) for name, value in found.scores().items()}
    {'net': 16.41, 'cumulative': 95.26, 'aligned': 0.36, 'layer magnitude': 1.35, 'layer angle': 0.53}
    """

    tokens: int
    segment: int
    segments: int
    net: Float[Tensor, " layers"]
    cumulative: Float[Tensor, " layers"]
    aligned: Float[Tensor, " layers"]
    steps: Float[Tensor, "2 steps layers"]
    magnitude: float
    angle: float

    @checked
    def scores(self, norm: Norm = "code") -> dict[str, float]:
        """Means over all layers. By the paper's text net is divided by N, by its code by N-1 (`norm`)."""
        share = (self.segments - 1) / self.segments if norm == "paper" and self.segments else 1.0
        return {
            "net": share * float(self.net.mean()),
            "cumulative": float(self.cumulative.mean()),
            "aligned": float(self.aligned.mean()),
            "layer magnitude": self.magnitude,
            "layer angle": self.angle,
        }

    @checked
    def after(self, step: int) -> dict[str, float]:
        """Net and cumulative change after so many steps, from 1 on, means over all layers; NaN where there are fewer.

        A step needs a segment more: step 4 is known after five segments.
        """
        known = 0 < step <= self.steps.shape[1]
        net, cumulative = self.steps[:, step - 1].mean(1).tolist() if known else (math.nan, math.nan)
        return {"net": net, "cumulative": cumulative}


@dataclass(frozen=True, eq=False)
class Chains:
    """The chains of a batch so far, a row each: of the running segment the sum and the tokens, of those that are over
    what the signals are made of."""

    total: Float[Tensor, "batch layers d_model"]
    first: Float[Tensor, "batch layers d_model"]
    last: Float[Tensor, "batch layers d_model"]
    units: Float[Tensor, "batch layers d_model"]
    cumulative: Float[Tensor, "batch layers"]
    steps: Float[Tensor, "batch 2 steps layers"]
    across: Float[Tensor, "batch 2"]
    fill: Int[Tensor, " batch"]
    segments: Int[Tensor, " batch"]
    tokens: Int[Tensor, " batch"]


class Meter:
    """Adds up the outputs of all blocks, pass by pass. `mask` of the pass says which tokens are of a chain."""

    def __init__(self, model: PreTrainedModel, segment: int, steps: int) -> None:
        self.model, self.segment, self.steps = model, segment, max(steps, 1)
        self.sites = sites_in(model, "resid_post")
        self.exact = torch.float32 if model.device.type == "mps" else torch.float64
        self._mask = torch.zeros(0, 0, dtype=torch.bool)
        self._weights: Tensor | None = None
        self._sums = torch.zeros(0)
        self._fill: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, the passes of the model are heard."""
        norm = architecture_of(self.model).final_norm
        inner = self.sites[:-1] if norm else self.sites
        with ExitStack() as stack:
            sees = {site: partial(self._see, at) for at, site in enumerate(inner)}
            stack.enter_context(hook_sites(self.model, sees))
            if norm:  # as `hidden_states` has it
                module, at = self.model.get_submodule(norm), len(inner)

                def after(_module: object, _args: object, output: Tensor) -> None:
                    self._see(at, output.detach())

                stack.enter_context(hooked(self.model, module, after, side="output", place="the final norm"))
            yield

    def fresh(self, batch: int) -> Chains:
        """Chains of which nothing was seen."""
        self._fill = None
        layers, device = len(self.sites), self.model.device
        width = width_of(self.model, self.sites[0])
        wide = torch.zeros(batch, layers, width, dtype=self.exact, device=device)
        steps = torch.full((batch, 2, self.steps, layers), math.nan, dtype=self.exact, device=device)
        none = torch.zeros(batch, dtype=torch.long, device=device)
        return Chains(wide, wide, wide, wide, wide[..., 0], steps, wide[:, 0, :1].expand(-1, 2), none, none, none)

    def begin(self, mask: Bool[Tensor, "batch new"]) -> None:
        """A pass, and which of its tokens are read."""
        self._mask, self._weights = mask, None

    def _see(self, layer: int, x: Float[Tensor, "batch new d_model"]) -> None:
        device, (batch, new) = self._mask.device, self._mask.shape
        if new == 1:
            if self._weights is None:
                self._weights = self._mask
                self._sums = torch.empty(batch, 1, len(self.sites), x.shape[-1], dtype=self.exact, device=device)
            self._sums[:, 0, layer] = x[:, 0]
            return
        if self._weights is None:
            fill = torch.zeros(batch, dtype=torch.long, device=device) if self._fill is None else self._fill
            place = (fill[:, None] + self._mask.cumsum(1) - 1).clamp(min=0) // self.segment
            many = (new + self.segment - 2) // self.segment + 1
            self._weights = (place[:, None] == torch.arange(many, device=device)[:, None]) & self._mask[:, None]
            self._sums = torch.empty(batch, many, len(self.sites), x.shape[-1], dtype=self.exact, device=device)
        self._sums[:, :, layer] = self._weights.to(self.exact) @ x.to(device, self.exact)

    def taken(self, chains: Chains) -> Chains:
        """The pass is over: the chains with what it read."""
        if self._weights is None:
            return chains
        if self._mask.shape[1] == 1:
            sums, counts = self._sums * self._mask[..., None, None], self._mask.long()
        else:
            sums, counts = self._sums, self._weights.sum(2)
        self._weights = None
        for sum_, count in zip(sums.unbind(1), counts.unbind(1), strict=True):
            chains = _added(chains, sum_, count)
            chains = _closed(chains, chains.fill == self.segment)
        self._fill = chains.fill
        return chains

    def finished(self, chains: Chains) -> list[Trajectory]:
        """What the chains came to; a segment that is not full counts."""
        chains = _closed(chains, chains.fill > 0)
        moves = (chains.segments - 1)[:, None].to(self.exact)
        known = moves.clamp(min=1).masked_fill(moves < 1, math.nan)
        way = chains.last - chains.first
        length = way.norm(dim=-1)
        net, cumulative = length / known, chains.cumulative + 0 * known
        aligned = (chains.units * way).sum(-1) / length.clamp(min=1e-300) / known
        across = chains.across / chains.segments[:, None].to(self.exact)  # 0 / 0 where nothing was read
        parts = (chains.tokens, chains.segments, net, cumulative, aligned, chains.steps, across)
        tokens, segments, nets, cumulatives, aligneds, steps, layers = (part.cpu() for part in parts)
        return [
            Trajectory(
                int(tokens[row]), self.segment, n, nets[row], cumulatives[row], aligneds[row],
                steps[row, :, : max(n - 1, 0)], *layers[row].tolist(),
            )
            for row, n in enumerate(segments.tolist())
        ]  # fmt: skip


class Follower:
    """Which tokens of a run's passes are thought, told by the clock, and the chains of its rows."""

    def __init__(self, meter: Meter, clock: Clock, left: Left) -> None:
        self.meter, self.clock, self._left = meter, clock, left
        none = torch.zeros(0, dtype=torch.bool, device=meter.model.device)
        self._memory: Remembered[tuple[Chains, Tensor, Tensor]] = Remembered((meter.fresh(0), none, none), self._leave)
        self._open = False

    @property
    def chains(self) -> Chains:
        """Of the rows that the last pass held, without that pass until `settle`."""
        return self._memory.state[0]

    def see(self, ids: Int[Tensor, "batch new"], mask: Tensor | None, n_past: int, rows: Rows | None) -> None:
        """A pass begins; the one before it is over."""
        self.settle()
        now = self.clock.advance(ids, mask, n_past, rows)
        if now.starts:
            fresh = self.meter.fresh(len(ids))
            no = torch.zeros(len(ids), dtype=torch.bool, device=fresh.fill.device)
            self._memory.begin(rows, (fresh, no, no))
        else:
            self._memory.turn(rows)
        self.meter.begin(self._thought(now))
        self._open = True

    def settle(self) -> None:
        """Take in the pass that is over."""
        if self._open:
            chains, opened, closed = self._memory.state
            chains = self.meter.taken(chains)
            self._memory.state = _closed(chains, closed & (chains.fill > 0)), opened, closed
            self._open = False

    def end(self) -> None:
        """The run is over: no row goes on."""
        self.settle()
        self._memory.begin(None, self._memory.state)

    def _thought(self, now: Phases) -> Bool[Tensor, "batch new"]:
        """Tokens that the model wrote, from the end of the first opening delimiter through the closing one after it."""
        chains, opened, closed = self._memory.state
        thinks, answer = now.phase == 1, now.phase == 2
        if now.starts:  # the prompt; without a header, a block that is closed may be of an earlier turn
            opened = thinks.any(1) if self.clock.delimiters.turn else thinks[:, -1]
            self._memory.state = chains, opened, opened & answer[:, -1]
            return torch.zeros_like(answer)
        within = opened[:, None] | (thinks.cumsum(1) > 0)
        ends = answer & within
        over = ends.cumsum(1) + closed[:, None] - ends.long()  # before this token
        self._memory.state = chains, within[:, -1], closed | ends.any(1)
        return within & now.real & (over == 0)

    def _leave(self, numbers: Sequence[int], state: tuple[Chains, Tensor, Tensor]) -> None:
        if len(state[1]):
            self._left(numbers or range(len(state[1])), self.meter.finished(state[0]))


def _added(chains: Chains, sums: Float[Tensor, "batch layers d_model"], count: Int[Tensor, " batch"]) -> Chains:
    """Tokens more, all of the running segment."""
    return replace(chains, total=chains.total + sums, fill=chains.fill + count, tokens=chains.tokens + count)


def _closed(chains: Chains, over: Bool[Tensor, " batch"]) -> Chains:
    """The running segment is over, in some rows."""
    if over.is_cpu and not over.any():
        return chains
    mean = chains.total / chains.fill.clamp(min=1)[:, None, None]
    starts = chains.segments == 0
    begins, moves, all_over = (x[:, None, None] for x in (over & starts, over & ~starts, over))
    first, change = mean.where(begins, chains.first), mean - chains.last
    length = change.norm(dim=-1)
    cumulative = chains.cumulative + length * moves[..., 0]
    units = chains.units + change / length[..., None].clamp(min=1e-300) * moves
    net = (mean - first).norm(dim=-1) / chains.segments.clamp(min=1)[:, None]
    at = (chains.segments - 1).clamp(0, chains.steps.shape[2] - 1)[:, None, None, None]
    now = torch.stack([net, cumulative], 1)[:, :, None]
    known = moves[..., None] & (chains.segments <= chains.steps.shape[2])[:, None, None, None]
    index = at.expand_as(now)
    return Chains(
        total=chains.total.masked_fill(all_over, 0),
        first=first,
        last=mean.where(all_over, chains.last),
        units=units,
        cumulative=cumulative,
        steps=chains.steps.scatter(2, index, now.where(known, chains.steps.gather(2, index))),
        across=chains.across + _across(mean) * over[:, None],
        fill=chains.fill.masked_fill(over, 0),
        segments=chains.segments + over,
        tokens=chains.tokens,
    )


def _across(mean: Float[Tensor, "batch layers d_model"]) -> Float[Tensor, "batch 2"]:
    """From layer to layer: the mean length of a change and its mean angle, over those from the first to the last."""
    below, above, ends = mean[:, :-1], mean[:, 1:], (mean[:, 0], mean[:, -1])
    length = (above - below).norm(dim=-1).mean(1) / (ends[1] - ends[0]).norm(dim=-1)
    angle = _angle(below, above).mean(1) / _angle(*ends)
    return torch.stack([length, angle], 1).nan_to_num(0.0)  # of rows without a segment


def _angle(one: Float[Tensor, "*rows d_model"], other: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
    return torch.cosine_similarity(one, other, dim=-1).clamp(-1, 1).arccos()
