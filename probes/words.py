"""Words that a parameter's `Literal` lists are checked where they are given: one mechanism at every public door."""

import inspect
import types
import typing
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeVar, cast

T = TypeVar("T", bound=Callable[..., Any])


def checked(door: T) -> T:
    """A function, or a dataclass, that refuses a word which is none of those its annotation lists.

    Raises ValueError, naming the parameter and the words that are known, before anything else is looked at.

    >>> from typing import Literal
    >>> from probes.words import checked
    >>> @checked
    ... def paint(colour: Literal["red", "green"]):
    ...     return colour
    >>> try:
    ...     paint("blue")
    ... except ValueError as error:
    ...     print(error)
    colour='blue' is not known. Known: 'red', 'green'.
    """
    if inspect.isclass(door):
        setattr(door, "__init__", checked(getattr(door, "__init__")))
        return cast(T, door)
    parameters = inspect.signature(door).parameters
    order = list(parameters)
    known = {name: listed for name, p in parameters.items() if (listed := _listed(p.annotation))}

    @wraps(door)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name, value in (*zip(order, args, strict=False), *kwargs.items()):
            if name in known and not known[name].allows(value):
                words = ", ".join(map(repr, known[name].words))
                raise ValueError(f"{name}={value!r:.80} is not known. Known: {words}.")
        return door(*args, **kwargs)

    return cast(T, call)


class _Listed(typing.NamedTuple):
    """The words of a parameter, and whether it may be something else that is no word."""

    words: tuple[Any, ...]
    more: bool

    def allows(self, value: Any) -> bool:
        return value in self.words if isinstance(value, str) or not self.more else True


def _listed(annotation: Any) -> _Listed | None:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = typing.get_args(annotation) if union else (annotation,)
    words = tuple(word for part in parts if typing.get_origin(part) is Literal for word in typing.get_args(part))
    if not words or str in parts:
        return None
    return _Listed(words, any(typing.get_origin(part) is not Literal for part in parts))
