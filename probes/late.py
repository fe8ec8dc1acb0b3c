"""Heavy libraries that start-up must not pay for: each is imported when something of it is first used."""

from typing import TYPE_CHECKING

import lazy_loader

# What may be imported late: here, or, of what a name in a type cannot stand for, inside a function.
LATE = ("plotly", "scipy", "pandas", "torch", "transformers")

if TYPE_CHECKING:
    from plotly import graph_objects as go
    from plotly import offline, subplots
    from scipy import optimize, special, stats
else:

    def _late(library: str, *names: str) -> list[object]:
        """Modules that load when they are first used; that the library's own `__init__` runs at once is known."""
        return [lazy_loader.load(f"{library}.{name}", suppress_warning=True) for name in names]

    go, offline, subplots = _late("plotly", "graph_objects", "offline", "subplots")
    optimize, special, stats = _late("scipy", "optimize", "special", "stats")

__all__ = ["LATE", "go", "offline", "optimize", "special", "stats", "subplots"]
