"""The public names of a package: listed in the stub beside it, and imported when they are first asked for."""

from collections.abc import Callable, Mapping

import lazy_loader


def exports(
    package: str, file: str, renamed: Mapping[str, str] | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, from its `__init__.pyi`: the one list of its public names.

    Nothing of the package is imported before it is used, so that `import steer` is cheap. An old name in `renamed`
    raises an ImportError that tells the new one.
    """
    found, listed, public = lazy_loader.attach_stub(package, file)

    def getattr_(name: str) -> object:
        if name in (renamed or {}):
            raise ImportError(f"{package}.{name} is now {package}.{(renamed or {})[name]}.")
        return found(name)

    return getattr_, listed, public
