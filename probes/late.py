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
    go, offline, subplots = (lazy_loader.load(f"plotly.{name}") for name in ("graph_objects", "offline", "subplots"))
    optimize, special, stats = (lazy_loader.load(f"scipy.{name}") for name in ("optimize", "special", "stats"))

__all__ = ["LATE", "go", "offline", "optimize", "special", "stats", "subplots"]
