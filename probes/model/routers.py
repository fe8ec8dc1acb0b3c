"""Sparse blocks: where a model's routers and experts are, what a router chose, and what the experts get instead."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.model.architectures import block_of, config_of, n_layers
from probes.model.passes import hooked
from probes.tables import Brief

Expert = tuple[int, int]  # layer and number, as the model counts them


@dataclass(frozen=True, eq=False, repr=False)
class Routing(Brief):
    """One pass of one layer: the router's logits, which `k` experts each token gets, and with what weights.

    >>> import torch
    >>> from probes.model import Routing
    >>> routing = Routing(torch.randn(1, 1, 4), weights=torch.tensor([[[0.75, 0.25]]]), ids=torch.tensor([[[2, 0]]]))
    >>> routing.dense
    tensor([[[0.2500, 0.0000, 0.7500, 0.0000]]])
    """

    logits: Float[Tensor, "batch pos n_experts"]
    weights: Float[Tensor, "batch pos k"]
    ids: Int[Tensor, "batch pos k"]

    @property
    def dense(self) -> Float[Tensor, "batch pos n_experts"]:
        """The weight of every expert, 0 where it was not chosen, in float32."""
        zero = self.weights.new_zeros(*self.ids.shape[:-1], self.logits.shape[-1]).float()
        return zero.scatter(-1, self.ids, self.weights.float())


@dataclass(frozen=True, eq=False, repr=False)
class SparseBlock(Brief):
    """The modules of one layer's sparse block."""

    block: nn.Module
    router: nn.Module
    experts: nn.Module

    @property
    def n_experts(self) -> int:
        """How many experts the router chooses among."""
        return int(getattr(self.router, "num_experts"))

    @property
    def k(self) -> int:
        """How many experts a token gets."""
        return int(getattr(self.router, "top_k"))


def sparse_block(model: nn.Module, layer: int) -> SparseBlock | None:
    """The sparse block of a layer; None where it is dense."""
    for module in block_of(model, layer).modules():
        parts = dict(module.named_children())
        router = parts.get("gate", parts.get("router"))
        if router is not None and "experts" in parts:
            return SparseBlock(module, router, parts["experts"])
    return None


def moe_layers(model: nn.Module) -> tuple[int, ...]:
    """The layers with a sparse block, as the model counts layers. Raises ValueError, naming the family, where there is
    none, or where its routers are not of the kind that is read here.

    >>> from probes.model import load, moe_layers
    >>> moe_layers(load("organism"))
    (0, 1, 2, 3)
    """
    found = {layer: sparse_block(model, layer) for layer in range(n_layers(model))}
    blocks = {layer: block for layer, block in found.items() if block is not None}
    if not blocks:
        family = config_of(model).model_type
        raise ValueError(f"{family} has no sparse block with a router and experts: there is nothing to route.")
    for block in blocks.values():
        _check_readable(model, block)
    return tuple(blocks)


def block_at(model: nn.Module, layer: int) -> SparseBlock:
    """The sparse block of a layer. Raises ValueError, naming the layers that have one, where it has none."""
    found = sparse_block(model, layer)
    if found is None:
        raise ValueError(
            f"Layer {layer} has no sparse block. The layers of this {config_of(model).model_type} that have one: "
            f"{', '.join(map(str, moe_layers(model)))}."
        )
    _check_readable(model, found)
    return found


def read_routing(block: SparseBlock, output: object, batch: tuple[int, ...]) -> Routing:
    """What a router gave back, as `[batch pos ...]`. Raises ValueError, naming it, where that is something else."""
    if isinstance(output, tuple) and len(output) == 3 and all(isinstance(part, Tensor) for part in output):
        logits, weights, ids = output
        fits = logits.shape[-1] == block.n_experts and weights.shape == ids.shape and ids.shape[-1] == block.k
        if fits and not ids.is_floating_point() and weights.is_floating_point():
            return Routing(*(part.reshape(*batch, part.shape[-1]) for part in output))
    raise ValueError(
        f"A {type(block.router).__name__} does not give back logits, weights and ids: its experts cannot be read here."
    )


def _check_readable(model: nn.Module, block: SparseBlock) -> None:
    if not all(hasattr(block.router, name) for name in ("num_experts", "top_k")):
        raise ValueError(
            f"The routers of {config_of(model).model_type} do not tell num_experts and top_k: they are of another kind "
            "than those read here."
        )


@contextmanager
def hook_router(
    model: nn.Module,
    layer: int,
    *,
    see: Callable[[Routing], None] | None = None,
    edit: Callable[[Routing], Routing | None] | None = None,
) -> Iterator[None]:
    """While open, `see` gets what the router of a sparse block chose, and what `edit` returns is what the experts get.

    `see` never sees an edit of its own layer. Raises ValueError, naming the family, where routers are not readable.
    """
    parts = block_at(model, layer)
    shape: list[tuple[int, ...]] = []
    found: list[Routing] = []

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape[:] = [tuple((args[0] if args else kwargs["hidden_states"]).shape[:-1])]

    def on_router(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        found[:] = [read_routing(parts, output, shape[0])]
        if see is not None:
            see(found[0])

    def change(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if len(args) != 3:
            raise ValueError(f"The experts of layer {layer} are not called with hidden states, ids and weights.")
        assert edit is not None
        new = edit(found[0])
        if new is None:
            return None
        k = new.ids.shape[-1]
        return (args[0], new.ids.reshape(-1, k), new.weights.reshape(-1, k)), kwargs

    with ExitStack() as stack:
        stack.enter_context(hooked(model, parts.block, begin, side="input", place=f"the sparse block of layer {layer}"))
        stack.enter_context(hooked(model, parts.router, on_router, side="output", place=f"the router of layer {layer}"))
        if edit is not None:
            where = f"the experts of layer {layer}"
            stack.enter_context(hooked(model, parts.experts, change, side="input", place=where))
        yield


@contextmanager
def hook_choice(model: nn.Module, layer: int, see: Callable[[Int[Tensor, "tokens k"]], None]) -> Iterator[None]:
    """While open, `see` gets which experts the router of a sparse block chose, rows one after another: as
    `hook_router`, for little time. What a router gives back is checked once."""
    parts, known = block_at(model, layer), False

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        nonlocal known
        if not known:
            read_routing(parts, output, (1, -1))
            known = True
        see(output[2])

    with hooked(model, parts.router, after, side="output", place=f"the router of layer {layer}"):
        yield
