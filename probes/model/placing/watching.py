"""One short pass of a model, in which what every module reads and puts out is seen."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.model.architectures import config_of
from probes.model.passes import hooked
from probes.model.placing.sums import random_ids


class NotFound(ValueError):
    """No row was found, and why."""


@dataclass(frozen=True)
class Seen:
    """What modules read and put out in the pass, by path, in the order in which they began."""

    read: dict[str, Tensor] = field(default_factory=dict)
    put: dict[str, Tensor] = field(default_factory=dict)
    given: list[tuple[dict[str, Tensor], str, Tensor]] = field(default_factory=list)

    def drop_repeated(self) -> None:
        """Forget the modules that ran more than once, a dropout that two summands share."""
        ran = Counter(path for told, path, _ in self.given if told is self.put)
        for path in [path for path, times in ran.items() if times > 1]:
            del self.put[path]
            self.read.pop(path, None)
        self.given[:] = [(told, path, x) for told, path, x in self.given if path in told]

    def keep(self, told: dict[str, Tensor], path: str, value: Any, rows: int) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if value.dim() == 2 and len(value) % rows == 0:  # rows one after another
            value = value.unflatten(0, (rows, -1))
        told[path] = value.detach().clone()
        self.given.append((told, path, value.detach()))

    def overwritten(self) -> set[tuple[str, str]]:
        """The places whose numbers were changed after they were seen, as side and path."""
        sides = {id(self.read): "input", id(self.put): "output"}
        return {(sides[id(told)], path) for told, path, x in self.given if not torch.equal(told[path], x)}


def list_of_blocks(model: PreTrainedModel) -> str:
    """The path of the text decoder's blocks."""
    n = getattr(config_of(model), "num_hidden_layers", None)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n and any(True for _ in module[0].children())
    ]
    if not lists:
        raise NotFound(f"the model has no list of {n} blocks")
    inside = [name for name in lists if name.startswith(f"{decoder_of(model)}.")]
    return str((inside or lists)[0])


def decoder_of(model: PreTrainedModel) -> str | None:
    """The name of the text decoder inside the model, where it has one."""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder and name), None)


def watched(model: PreTrainedModel, layers: str, blocks: list[nn.Module]) -> tuple[list[Seen], str]:
    """What each block's modules saw in a short pass; and the norm that reads the last stream, "" for none."""
    seen, outside = [Seen() for _ in blocks], Seen()
    with ExitStack() as stack:
        for block, one in zip(blocks, seen, strict=True):
            for path, module in block.named_modules():
                _watch(stack, model, module, path, one)
        for path, module in model.named_modules():
            if path and not path.startswith(f"{layers}.") and not isinstance(module, nn.ModuleList) and is_norm(module):
                _watch(stack, model, module, path, outside)
        try:
            model(input_ids=random_ids(model), use_cache=False)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise NotFound(f"a short pass of its token ids fails, {type(error).__name__}: {error}") from error
    if not all("" in one.put and "" in one.read for one in seen):
        raise NotFound(f"not every block of {layers} is reached by hidden states")
    if seen[0].read[""].shape[:-1] != random_ids(model).shape:
        raise NotFound(f"block 0 reads {list(seen[0].read[''].shape)} of {list(random_ids(model).shape)} tokens")
    for one in seen:
        one.drop_repeated()
    last = seen[-1].put[""]
    after = (path for path, x in outside.read.items() if same(x, last) and alike(outside.put.get(path), last))
    return seen, next(after, "")


def _watch(stack: ExitStack, model: PreTrainedModel, module: nn.Module, path: str, seen: Seen) -> None:
    rows = len(random_ids(model))

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.keep(seen.read, path, args[0] if args else kwargs.get("hidden_states"), rows)

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        seen.keep(seen.put, path, output[0] if isinstance(output, tuple) and output else output, rows)

    stack.enter_context(hooked(model, module, before, side="input", place=path, must=False))
    stack.enter_context(hooked(model, module, after, side="output", place=path, must=False))


def alike(x: Tensor | None, other: Tensor) -> TypeGuard[Tensor]:
    return x is not None and x.shape == other.shape


def same(x: Tensor | None, other: Tensor | None) -> bool:
    return x is not None and other is not None and x.shape == other.shape and torch.equal(x, other.to(x.device))


def is_norm(module: nn.Module) -> bool:
    return all(parameter.dim() < 2 for parameter in module.parameters())
