"""Frozen dataclasses as the plain fields that JSON holds, and back: what is read is checked against their types."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import isfinite, nan
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from probes.files import check_keys

T = TypeVar("T")

_LARGEST = 1 << 64


def plain(value: Any) -> Any:
    """What JSON can hold of a value: no tuple, and null for NaN and infinity. A `to_dict` of its own is called."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return plain_fields(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def plain_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, each as JSON can hold it."""
    return {field.name: plain(getattr(value, field.name)) for field in fields(value)}


def from_plain(kind: type[T], values: object, where: str) -> T:
    """The dataclass `kind` from its plain fields; null is NaN where a number is expected.

    `where` names it in a sentence. The metadata of a field may hold `where`, the name of what is inside it: a format
    of `key` (the field, or the item of it) and `whole` (the outer `where`). A class inside that has a `from_dict` reads
    itself. Raises ValueError for keys that are unknown or missing and for what should be a list or hold keys, by name,
    and TypeError for a number, text or truth value of another type.
    """
    known = {
        field.name: field.metadata.get("where", "The part {key!r} of {whole}") for field in fields(cast(Any, kind))
    }
    rows, hints = keys_of(values, where), get_type_hints(kind)
    check_keys(rows, known, where)
    return kind(**{name: _value(hints[name], rows[name], name, where, inner) for name, inner in known.items()})


def keys_of(values: object, where: str) -> Mapping[str, Any]:
    """A mapping as it is. Raises ValueError for anything else."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} should hold keys, but is {_quoted(values)}.")
    return values


def _value(hint: Any, value: Any, key: str | int, where: str, inner: str) -> Any:
    """What `hint` makes of the value that `where` holds under `key`."""
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if origin is Literal:
        if value not in parts:
            raise ValueError(f"{where} has {key} {_quoted(value)}. Known: {', '.join(map(str, parts))}.")
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in parts:
            return None
        return _value(next(part for part in parts if part is not NoneType), value, key, where, inner)
    if isinstance(origin, type) and is_dataclass(origin):
        name = inner.format(key=key, whole=where[:1].lower() + where[1:])
        reads_itself = getattr(origin, "from_dict", None)
        return reads_itself(value, name) if reads_itself else from_plain(origin, value, name)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        items = keys_of(value, f"{where}'s {key}")
        return {name: _value(parts[1], item, name, where, inner) for name, item in items.items()}
    if origin is not str and isinstance(origin, type) and issubclass(origin, Sequence):
        return _row(parts, value, key, where, inner)
    return _scalar(origin, value, key, where)


def _row(parts: tuple[Any, ...], value: object, key: str | int, where: str, inner: str) -> tuple[Any, ...]:
    """A tuple of a list; `parts` are the types of its items, one or each of them."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}'s {key} should be a list, but is {_quoted(value)}.")
    kinds = parts if len(parts) > 1 and parts[-1] is not Ellipsis else parts[:1] * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{where}'s {key} should hold {len(kinds)} items, but is {_quoted(value)}.")
    if set(parts) <= {int, Ellipsis} and set(map(type, value)) == {int}:  # thousands of token ids
        return tuple(value)
    return tuple(_value(kind, item, i, where, inner) for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _scalar(kind: Any, value: Any, key: str | int, where: str) -> Any:
    if kind is Any:
        return value
    if kind is float and value is None:
        return nan
    known = (int, float) if kind is float else kind
    if not isinstance(value, known) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{where}: {key} should be a {kind.__name__}, but is {_quoted(value)}")
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise ValueError(f"{where}: {key} is {_quoted(value)}, which is larger than any number of ours.")
    return value


def _quoted(value: object) -> str:
    """A value as it stands in a sentence, its beginning where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
