"""A model's tensors as they are named on disk, and what tensors on disk become once transformers loads them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

_USED = "_weight_conversions"  # where transformers keeps what it converted while it loaded, to undo it when it saves


def on_disk(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that a parameter is on disk, in a plain checkpoint."""
    with plain(model):
        out: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
    return out


def together(model: PreTrainedModel, name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The parameter that these tensors of a checkpoint become. Raises ValueError where they become another."""
    if list(parts) == [name]:
        return parts[name]
    loading = Loading.of(model)
    groups = loading.groups(parts)
    if set(groups) != {name}:
        odd = next(part for key, members in groups.items() if key != name for part in members)
        raise ValueError(f"{odd} is not a part of {name} to this version of transformers: add on disk instead.")
    return loading.made(name, groups[name], parts)[name]


@contextmanager
def plain(model: PreTrainedModel) -> Iterator[None]:
    """While open, transformers names the model's tensors as a plain checkpoint of its family does.

    Of a model that it dequantised while loading it would write the numbers under the names of the codes, and without
    their scales, so that they are read back as something else; of one with an adapter, under the adapter's names.
    """
    used = getattr(model, _USED, None)
    if not was_converted(model):
        yield
        return
    delattr(model, _USED)  # it then takes what the family's own conversions are
    try:
        yield
    finally:
        setattr(model, _USED, used)


def was_converted(model: PreTrainedModel) -> bool:
    """Did transformers convert what it loaded in another way than it does for plain checkpoints of the family?"""
    known = {_patterns(entry) for entry in get_model_conversion_mapping(model)}
    return any(_patterns(entry) not in known for entry in getattr(model, _USED, None) or ())


def _patterns(entry: WeightTransform) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(entry.source_patterns), tuple(entry.target_patterns)


@dataclass(frozen=True, eq=False)
class Loading:
    """How transformers loads a plain checkpoint into a model of this class and config; `state` is the model's."""

    model: PreTrainedModel
    renamings: list[WeightRenaming]
    converters: list[WeightConverter]
    state: dict[str, Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Loading":
        conversions = get_model_conversion_mapping(model)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        return cls(model, renamings, converters, model.state_dict(keep_vars=True))

    def groups(self, names: Iterable[str]) -> dict[str, dict[str, str | None]]:
        """Which tensors on disk are loaded together, by the name in the model, each with its converter's pattern."""
        found: dict[str, dict[str, str | None]] = {}
        for name in sorted(names, key=dot_natural_key):
            key, pattern = self._key(name)
            found.setdefault(key, {})[name] = pattern
        return found

    def made(self, key: str, members: Mapping[str, str | None], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the tensors of one group become: one parameter, or several where they are split."""
        by_pattern = {pattern: entry for entry in self.converters for pattern in entry.source_patterns}
        whole: Any = None
        for name, pattern in members.items():
            if pattern is None:
                return {key: parts[name]}
            whole = whole or deepcopy(by_pattern[pattern])
            whole.add_tensor(key, name, pattern, parts[name])
        made = whole.convert(key, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def _key(self, name: str) -> tuple[str, str | None]:
        prefix = self.model.base_model_prefix
        key, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.state)
        if key not in self.state and name in self.state:
            key, pattern = rename_source_key(name, [], [], prefix, self.state)
        return key, pattern


def unmade(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """What the config makes of the model's class, without numbers: on the device `meta`."""
    make: Any = type(model)
    with torch.device("meta"):
        out: PreTrainedModel = make(deepcopy(config))
    return out
