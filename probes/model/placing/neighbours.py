"""Models of TransformerLens and of nnsight: the plain one inside, whose modules they run.

Neither library is imported: a class is known by its name, and by where it is from.
"""

import re
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

_BRIDGED = "_original_component"  # where a bridge of TransformerLens keeps the module that it stands for


def inside(source: object) -> tuple[PreTrainedModel, Any] | None:
    """The model of transformers that a bridge or an envoy runs, and its tokenizer, if it has one; None for anything
    else. Raises ValueError where the weights are not there, or are another model's.

    A hook of ours on the model works in their runs too, and one of theirs in ours.
    """
    theirs: Any = source
    known = {(base.__module__.partition(".")[0], base.__name__) for base in type(source).__mro__}
    if ("transformer_lens", "TransformerBridge") in known:
        model = theirs.original_model
    elif ("nnsight", "Envoy") in known:
        model = theirs._module
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                "The weights of this nnsight model are not here yet: call its dispatch(), and load it then. Where they "
                "stay on NDIF, steer.interop.trace_edits says what a recipe does inside a trace."
            )
    elif ("transformer_lens", "HookedTransformer") in known:
        raise ValueError(
            "A HookedTransformer computes with code of its own, not with that of transformers: load the hub id, or "
            "give its TransformerBridge, TransformerBridge.boot_transformers(name)."
        )
    else:
        return None
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"This {type(source).__name__} is around a {type(model).__name__}: no model of transformers.")
    return model, getattr(theirs, "tokenizer", None)


def unbridged(module: nn.Module) -> nn.Module:
    """The module itself, or the one that a bridge stands for."""
    while _BRIDGED in module._modules:
        module = cast("nn.Module", module._modules[_BRIDGED])
    return module


def named_weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters by the names that the plain model gives them, without those that bridges add."""
    named = list(model.named_parameters(remove_duplicate=False))
    bridges = {name[: mark.start()] for name, _ in named for mark in re.finditer(rf"\.{_BRIDGED}", name)}
    if not bridges:
        return list(model.named_parameters())
    found: dict[int, tuple[str, nn.Parameter]] = {}  # each once, by the first name that it has
    for name, own in named:
        if all(_is_plain(name, bridge) for bridge in bridges):
            found.setdefault(id(own), (name.replace(f".{_BRIDGED}", ""), own))
    return [(name, own) for name, own in found.values() if not _is_added(name, own)]


def _is_plain(name: str, bridge: str) -> bool:
    """Is it outside of the bridge, or of the module behind it?"""
    return not name.startswith(f"{bridge}.") or name.startswith(f"{bridge}.{_BRIDGED}.")


def _is_added(name: str, own: nn.Parameter) -> bool:
    """TransformerLens 3 gives the head over the vocabulary a bias of zeros."""
    return name.endswith("lm_head.bias") and not own.any()
