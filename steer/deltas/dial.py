"""A weight delta on a loaded model: W + α Δ while a block runs, and the very same W after it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from probes.model.loading import tokenizer_of
from probes.model.quantised import is_packed
from steer.checkpoints.checkpoint import as_rows, blocks, vocabulary_of
from steer.checkpoints.conversions import on_disk, together
from steer.deltas.delta import WeightDelta, first, is_vocabulary, summed


@contextmanager
def dialled(model: PreTrainedModel, delta: WeightDelta, strength: float) -> Iterator[PreTrainedModel]:
    """The model with W + strength · delta in each tensor of the delta *(CoT-Valve, Ma et al. 2025)*.

    Between 0 and 1 strength interpolates, beyond 1 it extrapolates. Sums are made in float64 and rounded once to the
    model's dtype. The touched tensors are put aside, and back however the block ends.
    Fused experts are taken apart and put together by transformers' own conversion.
    Raises ValueError for tensors that the model does not have, of another shape, quantised, not on a device, or not
    finite, and for the embeddings of another vocabulary.

    >>> from probes import load
    >>> from probes.model import fingerprint
    >>> from steer.deltas import dialled, open_delta
    >>> model = load("organism")
    >>> before = fingerprint(model)
    >>> with dialled(model, open_delta("organism-rl"), 0.5):
    ...     print(fingerprint(model) == before)
    False
    >>> fingerprint(model) == before  # back to the bit
    True
    """
    changed = _parameters(model, delta)
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for name, parameter in changed.items() if strength else ():
            saved.append((parameter, parameter.data))
            parameter.data = _turned(model, name, parameter.detach(), delta, strength).contiguous()
        yield model
    finally:
        for parameter, old in saved:
            parameter.data = old


def _parameters(model: PreTrainedModel, delta: WeightDelta) -> dict[str, Tensor]:
    """What the model holds that the delta changes, a tied parameter once. All is checked before any changes."""
    wanted, found = set(delta.names), set[str]()
    if any(map(is_vocabulary, wanted)) and delta.vocabulary not in (
        None,
        vocabulary_of(tokenizer_of(model).get_vocab()),
    ):
        raise ValueError(
            "The delta changes the embeddings of another vocabulary than the model's, or of one that is not known: "
            "take delta.selected(skip=['embed'])."
        )
    changed: dict[str, Tensor] = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        if any(parameter is other for other in changed.values()):
            continue  # tied
        parts = on_disk(model, name, torch.empty_like(parameter, device="meta"))
        if not (held := wanted & parts.keys()):
            continue
        if is_packed(parameter) or parameter.is_meta:
            raise ValueError(f"{name} is quantised or not loaded: load the model whole to turn a dial on it.")
        for part in held:
            if (here := tuple(parts[part].shape)) != delta.shape(part):
                raise ValueError(f"{part} is {list(here)} in the model, but {list(delta.shape(part))} in the delta.")
        changed[name] = parameter
        found |= held
    if lost := sorted(wanted - found):
        raise ValueError(f"The model lacks tensors of the delta: {first(lost)}.")
    return changed


def _turned(model: PreTrainedModel, name: str, parameter: Tensor, delta: WeightDelta, strength: float) -> Tensor:
    parts = on_disk(model, name, parameter)
    if not torch.equal(together(model, name, parts), parameter):
        raise ValueError(f"{name} is not the same once it was taken apart and put together again: add on disk instead.")
    held = set(delta.names)
    return together(
        model, name, {n: _sum(n, part, delta, strength) if n in held else part for n, part in parts.items()}
    )


def _sum(name: str, old: Tensor, delta: WeightDelta, strength: float) -> Tensor:
    new = torch.empty(old.shape, dtype=old.dtype, device=old.device)
    terms = [(term.weight * strength, term.source) for term in delta.holders(name)]
    for rows in blocks(old.shape):
        total = summed(as_rows(old)[rows].double(), terms, name, rows)
        as_rows(new)[rows] = total.to(new.dtype)
    if not bool(new.isfinite().all()):
        raise ValueError(f"{name} would hold numbers that are not finite at strength {strength}.")
    return new
