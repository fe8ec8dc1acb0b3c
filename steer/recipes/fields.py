"""A frozen dataclass out of the words and the tensors that a recipe file has for it, read by the types of its fields.

A tensor is the field `vector`, or one whose metadata say `{"tensor": True}`.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from torch import Tensor

from probes.directions.provenance import Provenance
from probes.files import check_keys
from probes.model.sites import Site

T = TypeVar("T")

_LARGEST = 3.4e38
_BESIDE = ("vector", "birth")  # kept elsewhere: the one in the safetensors file, the other once for all steps


def fields_of(value: Any) -> dict[str, Any]:
    """What is written of a dataclass: sites as text, and null for an infinite bound."""
    return {name: _plain(getattr(value, name)) for name in names_of(type(value))}


def tensors_of(value: Any) -> dict[str, Tensor]:
    """What lies in the safetensors file beside the words."""
    return {name: held for name in tensor_names(type(value)) if (held := getattr(value, name)) is not None}


def read(
    kind: type[T],
    values: Any,
    where: str,
    *,
    vector: Tensor | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    birth: Provenance | None = None,
) -> T:
    """The `kind` that `fields_of` and `tensors_of` wrote.

    Raises ValueError, naming `where`, for a key or a value that it cannot hold.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}, which is no mapping.")
    own = dataclass_fields(kind)
    check_keys(values, names_of(kind), where)
    hints = get_type_hints(kind)
    read_values = {name: _value(value, name, hints[name], own[name], where) for name, value in values.items()}
    read_values |= dict(tensors or {}) | ({} if vector is None else {"vector": vector})
    if "birth" in own:
        read_values["birth"] = birth
    return kind(**read_values)


def dataclass_fields(kind: type) -> dict[str, Field[Any]]:
    """The fields of a kind by name: each is a frozen dataclass, which a Protocol cannot say."""
    return {field.name: field for field in fields(cast("Any", kind))}


def names_of(kind: type) -> list[str]:
    """The fields that a step of the file holds."""
    return [name for name in dataclass_fields(kind) if name not in (*_BESIDE, *tensor_names(kind))]


def tensor_names(kind: type) -> list[str]:
    """The fields that are tensors."""
    own = dataclass_fields(kind)
    return [name for name, field in own.items() if name == "vector" or field.metadata.get("tensor")]


def _plain(value: Any) -> Any:
    if isinstance(value, Site):
        return str(value)
    return None if isinstance(value, float) and math.isinf(value) else value


def _value(value: Any, name: str, hint: Any, field: Field[Any], where: str) -> Any:
    options = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
    if value is None and NoneType in options:
        return None
    if value is None and isinstance(field.default, float) and math.isinf(field.default):
        return field.default
    if Site in options:
        if not isinstance(value, str):
            raise ValueError(f"{where} has {name} {value!r}, which is no text.")
        return Site.parse(value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where} has {name} {value!r}. Known: {', '.join(get_args(hint))}.")
        return value
    if bool in options:
        if not isinstance(value, bool):
            raise ValueError(f"{where} has {name} {value!r}, which is neither true nor false.")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} has {name} {value!r}, which is no number.")
    if int in options:
        if not isinstance(value, int):
            raise ValueError(f"{where} has {name} {value!r}, which is no whole number.")
        return value
    if abs(value) > _LARGEST:
        raise ValueError(f"{where} has {name} {str(value)[:40]}. Give a finite number, that float32 can hold.")
    return float(value)
