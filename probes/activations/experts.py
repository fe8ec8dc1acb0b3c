"""How often each expert of each layer is chosen, by class of tokens: counts alone are kept, no logits."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from probes.activations._record import batches
from probes.generation.completions import Completion
from probes.model.hooks import forward_through, hook_inputs
from probes.model.loading import tokenizer_of
from probes.model.routers import Routing, block_at, hook_choice, hook_router, moe_layers
from probes.model.tokens import present_markers
from probes.rows import Rows
from probes.tables import Brief, Shown, Table
from probes.thinking.phases import PHASES, Clock
from probes.thinking.spans import Span

Ways = Sequence[tuple[int, ...]]  # the token ids a marker may be written with
_PASSES, _TOKENS = 128, 4096  # what is held before it is counted


@dataclass(frozen=True, eq=False, repr=False)
class ExpertCounts(Shown):
    """By class of tokens: how many there were, and how many of them chose each expert.

    Classes are `all`, the phases `prompt`, `thinking` and `answer`, and each marker: the tokens at which it ends.
    `layers` are the model's numbers of its sparse layers. A token counts once for each pass it is in. `lacking` markers
    are not in the vocabulary, and have no class.

    >>> from probes import generate, load
    >>> from probes.activations import read_experts
    >>> model = load("organism")
    >>> counts = read_experts(model, generate(model, ["a 3 b +4 c *7"]), ["Okay"]).total()
    >>> counts.classes, counts.tokens.tolist()
    (('all', 'prompt', 'thinking', 'answer', 'Okay'), [21, 8, 10, 3, 1])
    >>> counts.load("thinking").shape
    torch.Size([4, 8])
    """

    layers: tuple[int, ...]
    classes: tuple[str, ...]
    counts: Int[Tensor, "classes layers experts"]
    tokens: Int[Tensor, " classes"]
    lacking: tuple[str, ...] = ()

    def load(self, kind: str = "all") -> Float[Tensor, "layers experts"]:
        """The share of a class's tokens that chose each expert. Raises ValueError where the class has no token."""
        if kind not in self.classes:
            why = "not in the vocabulary" if kind in self.lacking else "no class of these tokens"
            raise ValueError(f"{kind!r} is {why}. Known: {', '.join(self.classes)}.")
        at = self.classes.index(kind)
        if not int(self.tokens[at]):
            raise ValueError(f"No token of the class {kind!r} was seen, so that it has no load.")
        return self.counts[at].double() / self.tokens[at]

    def __add__(self, other: "ExpertCounts") -> "ExpertCounts":
        """The counts of both. Raises ValueError where they are of other layers or classes."""
        if (self.layers, self.classes) != (other.layers, other.classes):
            raise ValueError("Counts of other layers or other classes do not add up.")
        counts, tokens = self.counts + other.counts, self.tokens + other.tokens
        return ExpertCounts(self.layers, self.classes, counts, tokens, self.lacking)

    def table(self, kind: str = "all") -> Table:
        """Every expert, the busiest first."""
        load = self.load(kind)
        order = load.flatten().sort(descending=True, stable=True).indices.tolist()
        width = load.shape[1]
        rows = [
            (f"L{self.layers[i // width]}E{i % width}", int(self.counts[self.classes.index(kind)].flatten()[i]),
             float(load.flatten()[i]))
            for i in order
        ]  # fmt: skip
        return Table(("expert", "chosen", "share"), tuple(rows), f"{kind} tokens")


@dataclass(frozen=True, eq=False, repr=False)
class ExpertReading(Brief):
    """`ExpertCounts` of each completion, so that completions can be resampled. `lacking` markers are not in the
    vocabulary.

    >>> from probes import generate, load
    >>> from probes.activations import read_experts
    >>> model = load("organism")
    >>> reading = read_experts(model, generate(model, ["a 3 b +4 c *7", "a 5 b -2 c +9"]))
    >>> reading.counts.shape, reading.total().counts.shape
    (torch.Size([2, 4, 4, 8]), torch.Size([4, 4, 8]))
    """

    layers: tuple[int, ...]
    classes: tuple[str, ...]
    counts: Int[Tensor, "completions classes layers experts"]
    tokens: Int[Tensor, "completions classes"]
    lacking: tuple[str, ...] = ()

    def total(self) -> ExpertCounts:
        """The counts over all completions."""
        return ExpertCounts(self.layers, self.classes, self.counts.sum(0), self.tokens.sum(0), self.lacking)


def read_experts(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    markers: Sequence[str] = (),
    *,
    batch_tokens: int = 16_384,
    label: str = "reading experts",
) -> ExpertReading:
    """Which experts the tokens of completions choose, prompt included, in one pass over each.

    A marker is searched as token ids, with and without a space before it; one that the vocabulary lacks is named in
    the reading and left out. An empty `label` shows no bar. Raises ValueError for a family whose routers cannot be
    read.

    >>> from probes import generate, load
    >>> from probes.activations import read_experts
    >>> model = load("organism")
    >>> reading = read_experts(model, generate(model, ["a 3 b +4 c *7"]), ["Okay", "Alternatively"])
    >>> reading.classes, reading.lacking
    (('all', 'prompt', 'thinking', 'answer', 'Okay'), ('Alternatively',))
    """
    found, lacking = present_markers(tokenizer_of(model), markers)
    tally = _Tally(model, found)
    spans = [Span(c.all_ids, 0, len(c.all_ids)) for c in completions]
    if not spans:
        raise ValueError("Experts are read off completions, but there is none.")
    n_experts = block_at(model, tally.layers[0]).n_experts
    counts = torch.zeros(len(spans), len(tally.classes), len(tally.layers), n_experts, dtype=torch.int32)
    tokens = torch.zeros(len(spans), len(tally.classes), dtype=torch.int32)
    with tqdm(total=len(spans), desc=label, unit="completion", delay=2, leave=False, disable=not label) as bar:
        for rows in batches(model, spans, batch_tokens):
            seen, many = tally.of_rows(model, [spans[row].ids for row in rows])
            counts[rows], tokens[rows] = seen.int().cpu(), many.int().cpu()
            bar.update(len(rows))
    return ExpertReading(tally.layers, tally.classes, counts, tokens, lacking)


@torch.no_grad()
def weights_along(model: PreTrainedModel, completion: Completion) -> Float[Tensor, "layers pos experts"]:
    """The routing weight of every expert of each sparse layer at each token of one completion, prompt included: 0 where
    it was not chosen. Float32, on the CPU.

    Raises ValueError for a family without routers that can be read.

    >>> from probes import generate, load
    >>> from probes.activations import weights_along
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> weights = weights_along(model, completion)
    >>> len(completion.all_ids), weights.shape
    (21, torch.Size([4, 21, 8]))
    """
    layers, found = moe_layers(model), list[Tensor]()
    ids = torch.tensor([completion.all_ids], device=model.device)
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(hook_router(model, layer, see=lambda routing: found.append(routing.dense[0].cpu())))
        forward_through(model, layers[-1], ids, torch.ones_like(ids))
    return torch.stack(found)


@contextmanager
def counting(model: PreTrainedModel, markers: Sequence[str] = ()) -> Iterator[ExpertCounts]:
    """While open, counts what every pass of the model chooses, under prefill and decoding alike.

    The counts are whole when the block ends; meanwhile they are filled every few passes, on the model's device. Pads
    are left out; what steers the routing does not change what is counted in the same layer. Raises ValueError for a
    family whose routers cannot be read.

    >>> from probes import generate, load
    >>> from probes.activations import counting
    >>> model = load("organism")
    >>> with counting(model) as counts:
    ...     (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> dict(zip(counts.classes, counts.tokens.tolist()))
    {'all': 20, 'prompt': 8, 'thinking': 10, 'answer': 2}
    """
    ways, lacking = present_markers(tokenizer_of(model), markers)
    tally = _Tally(model, ways)
    n_experts, device = block_at(model, tally.layers[0]).n_experts, model.device
    counts = torch.zeros(len(tally.classes), len(tally.layers), n_experts, dtype=torch.long, device=device)
    tokens = torch.zeros(len(tally.classes), dtype=torch.long, device=device)
    held = _Held(tally, counts, tokens)
    with ExitStack() as stack:
        stack.enter_context(hook_inputs(model, held.begin))
        for row, layer in enumerate(tally.layers):
            stack.enter_context(hook_choice(model, layer, partial(held.see, row)))
        yield ExpertCounts(tally.layers, tally.classes, counts, tokens, lacking)
        held.settle()


class _Held:
    """The last few passes, counted together, so that a decode step costs little: at most `_PASSES`, or `_TOKENS`."""

    def __init__(self, tally: "_Tally", counts: Tensor, tokens: Tensor) -> None:
        self.tally, self.counts, self.tokens = tally, counts, tokens
        self._ids: list[Tensor] = []
        self._mask: Tensor | None = None
        self._rows: Rows | None = None
        self._past = self._width = 0
        self._chosen: list[dict[int, Tensor]] = [{} for _ in tally.layers]  # by layer and pass

    def begin(self, ids: Int[Tensor, "batch new"], mask: Tensor | None, n_past: int, rows: Rows | None) -> None:
        if self._ids:
            follows = n_past == self._past + self._width and len(ids) == len(self._ids[0]) and rows is self._rows
            if not follows or len(self._ids) >= _PASSES or self._width * len(ids) >= _TOKENS:
                self.settle()
        if not self._ids:
            self._past, self._width, self._rows = n_past, 0, rows
        self._ids.append(ids)
        self._width += ids.shape[1]
        self._mask = mask

    def see(self, row: int, ids: Int[Tensor, "tokens k"]) -> None:
        self._chosen[row][len(self._ids) - 1] = ids

    @torch.no_grad()
    def settle(self) -> None:
        """Count what is held."""
        if not self._ids:
            return
        batch, widths, ids = len(self._ids[0]), [x.shape[1] for x in self._ids], torch.cat(self._ids, 1)
        self._ids = []
        self.tally.begin(ids, self._mask, self._past, self._rows)
        self.tokens += self.tally.masks.sum((1, 2)).to(self.tokens.device).long()
        for row, found in enumerate(self._chosen):
            if found:  # a pass may stop below this layer
                masks = self.tally.masks.split(widths, 2)
                own = torch.cat([x.reshape(batch, widths[at], -1) for at, x in found.items()], 1)
                seen = _chosen(torch.cat([masks[at] for at in found], 2), own, self.counts.shape[2])
                self.counts[:, row] += seen.sum(1).to(self.counts.device).long()
                found.clear()


class _Tally:
    """Which tokens of the current pass are in which class: `masks` is [classes batch new], as numbers."""

    def __init__(self, model: PreTrainedModel, markers: Mapping[str, Ways]) -> None:
        self.layers = moe_layers(model)
        self.clock = Clock.of(model, needed=False, markers=[tuple(ways) for ways in markers.values()])
        self.classes = ("all", *(PHASES if self.clock.knows_phases else ()), *markers)
        self.masks = torch.zeros(0)

    def begin(self, ids: Int[Tensor, "batch new"], mask: Tensor | None, n_past: int, rows: Rows | None = None) -> None:
        now = self.clock.advance(ids, mask, n_past, rows)
        phases = now.masks() if self.clock.knows_phases else now.real[:0].expand(0, *now.real.shape)
        self.masks = torch.cat([now.real[None], phases, *(ends[None] for ends in now.ended)]).float()

    def of_rows(
        self, model: PreTrainedModel, rows: Sequence[tuple[int, ...]]
    ) -> tuple[Float[Tensor, "rows classes layers experts"], Float[Tensor, "rows classes"]]:
        """Row by row, in one pass over all of them, padded on the right."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=model.device)
        real = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
        found: dict[int, Tensor] = {}

        def see(layer: int, routing: Routing) -> None:
            found[layer] = _chosen(self.masks, routing.ids, routing.logits.shape[-1]).transpose(0, 1)

        with ExitStack() as stack:
            stack.enter_context(hook_inputs(model, self.begin))
            for layer in self.layers:
                stack.enter_context(hook_router(model, layer, see=partial(see, layer)))
            forward_through(model, self.layers[-1], ids, real.long().to(ids.device))
        if missing := [layer for layer in self.layers if layer not in found]:
            raise ValueError(
                f"The routers of layers {str(missing)[1:-1]} were not heard from: a fused kernel may stand in for "
                "them. Load the model without kernels, and dequantised."
            )
        seen = [found[layer].to(ids.device) for layer in self.layers]
        return torch.stack(seen, dim=2), self.masks.sum(2).T


def _chosen(
    masks: Float[Tensor, "classes batch new"], ids: Int[Tensor, "batch new k"], n_experts: int
) -> Float[Tensor, "classes batch experts"]:
    """In each row, how many tokens of each class chose each expert."""
    one = torch.zeros(*ids.shape[:-1], n_experts, device=ids.device)
    return torch.einsum("cbt,bte->cbe", masks.to(one.device), one.scatter_(-1, ids, 1.0))
