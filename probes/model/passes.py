"""What holds of every pass that is listened to: each hook is heard, on the model it was put on, by one thread.

A hook may be lost in silence: compiled code was traced without it, a kernel stands in for the module that carries it,
a copy of the model carries it away, another thread runs the model at the same time. All hooks are put on here, where
each of these is made right or refused.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Thread, current_thread
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from probes.model.architectures import config_of
from probes.rows import Rows

Name = str | Callable[[], str]
Hook = Callable[..., Any]
Side = Literal["input", "output"]


class _Ear:
    """A hook's place, in words, and whether it was heard in this pass."""

    def __init__(self, place: str, must: bool) -> None:
        self.place, self.must, self.heard = place, must, False


class _Watch:
    """The hooks and edits that are on one model now, and the thread that runs it."""

    def __init__(self, depth: object) -> None:
        self.depth = depth
        self.names: list[Name | None] = []
        self.ears: list[_Ear] = []
        self.runner: Thread | None = None
        self.shape: tuple[int, int] = (0, 0)
        self.users = 0
        self.closing = ExitStack()


_WATCHES: "WeakKeyDictionary[nn.Module, _Watch]" = WeakKeyDictionary()
_ROWS: "WeakKeyDictionary[nn.Module, Rows]" = WeakKeyDictionary()
_ELSEWHERE: "WeakKeyDictionary[nn.Module, dict[str, int]]" = WeakKeyDictionary()


def edits_of(model: nn.Module) -> tuple[str | None, ...]:
    """The names of the edits that are attached to the model now, each once; None for one without a name."""
    watch = _WATCHES.get(model)
    names = [] if watch is None else watch.names
    said = [None if name is None else name if isinstance(name, str) else name() for name in names]
    return tuple(dict.fromkeys(said))


def tell_touched(model: nn.Module, name: str, tokens: int) -> None:
    """An engine that runs the model elsewhere tells how many tokens more the edit of this name has touched there."""
    told = _ELSEWHERE.setdefault(model, {})
    told[name] = told.get(name, 0) + tokens


def touched_elsewhere(model: nn.Module, name: str) -> int | None:
    """What engines told of an edit that is attached now; None where none of them ran."""
    return _ELSEWHERE.get(model, {}).get(name)


def rows_of(model: nn.Module) -> Rows | None:
    """Which rows of a run the pass holds that the model makes now; None where nobody said."""
    return _ROWS.get(model)


def shape_of(model: nn.Module) -> tuple[int, int]:
    """How many rows and tokens the pass has that the model makes now, while it is hooked."""
    return _WATCHES[model].shape


@contextmanager
def holding(model: nn.Module, rows: Rows | None) -> Iterator[None]:
    """While open, the model's passes hold these rows of a run, and whoever listens is told."""
    if rows is not None:
        _ROWS[model] = rows
    try:
        yield
    finally:
        _ROWS.pop(model, None)


@contextmanager
def named_edit(model: nn.Module, name: Name | None) -> Iterator[None]:
    """While open, the model is known to be edited by what `name` tells, a text or what gives one when asked."""
    with _watched(model) as watch:
        watch.names.append(name)
        try:
            yield
        finally:
            watch.names.remove(name)
            if not watch.names:
                _ELSEWHERE.pop(model, None)


@contextmanager
def hooked(
    model: nn.Module, module: nn.Module, hook: Hook, *, side: Side, place: str, must: bool = True
) -> Iterator[None]:
    """While open, `hook` is on `module`, a part of `model`: before it with its keywords, or after it.

    A copy of the model that is made meanwhile is a plain one. Compiled modules run as they were written. At the end of
    a pass of the model in which a hook that `must` be was not heard, ValueError is raised, naming its `place`; and
    where a second thread runs the model.
    """
    with all_hooked(model, [(module, hook, side, place)], must=must):
        yield


@contextmanager
def all_hooked(
    model: nn.Module, hooks: Iterable[tuple[nn.Module, Hook, Side, str]], *, must: bool = True
) -> Iterator[None]:
    """As `hooked`, for many in little time: each a module, its hook, its side and its place."""
    with _watched(model) as watch, ExitStack() as stack:
        for module, hook, side, place in hooks:
            ear = _Ear(place, must)
            own = _own(module, ear, hook)
            if side == "input":
                handle = module.register_forward_pre_hook(own, with_kwargs=True)
            else:
                handle = module.register_forward_hook(own)
            stack.callback(handle.remove)
            watch.ears.append(ear)
            stack.callback(watch.ears.remove, ear)
        yield


@contextmanager
def attending_by(model: PreTrainedModel, name: str) -> Iterator[None]:
    """While open, every config of the model names this implementation of attention, where its family takes one."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    configs = {id(config): config for part in parts for config in _configs(part.config)}  # the outer ones first
    former = [(config, config._attn_implementation) for config in configs.values()]
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        for config, own in former:
            config._attn_implementation = own


def _configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if isinstance(part, PretrainedConfig):
            yield from _configs(part)


def _own(module: nn.Module, ear: _Ear, hook: Hook) -> Hook:
    def own(called: nn.Module, *rest: Any) -> Any:
        if called is not module:
            return None
        ear.heard = True
        return hook(called, *rest)

    return own


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Watch]:
    """The watch over the model's passes; the first to open it puts it on, and the last to close it takes it away."""
    watch = _WATCHES.get(model)
    if watch is None:
        watch = _WATCHES[model] = _Watch(_depth(model))
        if "torch._dynamo" in sys.modules:  # what was compiled was traced without the hooks
            watch.closing.enter_context(torch.compiler.set_stance("force_eager"))
        _put_on(watch, ref(model))
    watch.users += 1
    try:
        yield watch
    finally:
        watch.users -= 1
        if not watch.users:
            _WATCHES.pop(model)
            watch.closing.close()


def _put_on(watch: _Watch, model: "ref[nn.Module]") -> None:
    """Closures, which a copy of the model keeps as they are: they know that it is another."""
    whole = model()
    assert whole is not None

    def begin(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if called is model():
            given = args[0] if args else kwargs.get("input_ids")
            given = kwargs.get("inputs_embeds") if given is None else given
            watch.shape = (0, 0) if given is None else (given.shape[0], given.shape[1])
            _begin(called, watch)

    def end(called: nn.Module, _args: object, _output: object) -> None:
        if called is model():
            _end(watch)

    for handle in (whole.register_forward_pre_hook(begin, with_kwargs=True), whole.register_forward_hook(end)):
        watch.closing.callback(handle.remove)


def _begin(model: nn.Module, watch: _Watch) -> None:
    this = current_thread()
    if watch.runner is not None and watch.runner is not this and watch.runner.is_alive():
        raise ValueError(
            f"The thread {this.name!r} runs a model that the thread {watch.runner.name!r} is steering or reading: each "
            "would get the other's activations. Run one after the other, or give each thread a copy of the model."
        )
    watch.runner = this
    if _depth(model) != watch.depth:
        raise ValueError(
            "The model was told to leave early, as its own assistant: a pass that ends at another layer cannot be "
            "told from a whole one. Generate without assistant_early_exit."
        )
    if watch.names and model.training and torch.is_grad_enabled() and _checkpoints(model):
        raise ValueError(
            "Gradient checkpointing runs each block a second time in the backward pass, when a recipe no longer knows "
            "which tokens it was. Call model.activation_checkpointing_disable(), or train without the recipe."
        )
    for ear in watch.ears:
        ear.heard = False


def _end(watch: _Watch) -> None:
    deaf = [ear.place for ear in watch.ears if ear.must and not ear.heard]
    if deaf:
        raise ValueError(
            f"The model ran, but not through the hook at {deaf[0]}: a kernel or another forward stands in for the "
            "module there. Load the model without use_kernels, dequantised, and with its own forward."
        )


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _depth(model: nn.Module) -> object:
    return getattr(config_of(model), "num_hidden_layers", None)
