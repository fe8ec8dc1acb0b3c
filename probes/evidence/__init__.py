"""Is it real? Held-out separation, nulls, and association with markers."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
