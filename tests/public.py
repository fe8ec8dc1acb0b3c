"""What is public: the names in the stubs of the packages, and what the modules among them define."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(
    ".".join(stub.parent.relative_to(ROOT).parts) for top in ("probes", "steer") for stub in (ROOT / top).rglob("*.pyi")
)


def public_names() -> Iterator[tuple[str, object]]:
    """Each public name with what it stands for; a public module is taken apart into what it defines."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, ModuleType):
                for own, inner in vars(value).items():
                    if getattr(inner, "__module__", None) == value.__name__ and not own.startswith("_"):
                        yield f"{package}.{name}.{own}", inner
            else:
                yield f"{package}.{name}", value


def public_callables() -> dict[str, object]:
    """Public functions and classes, each once, under the longest of its names: the one in the package it lives in."""
    found: dict[int, tuple[str, object]] = {}
    for name, value in public_names():
        if inspect.isfunction(value) or inspect.isclass(value):
            old = found.get(id(value))
            if old is None or old[0].count(".") < name.count("."):
                found[id(value)] = name, value
    return dict(sorted(found.values()))
