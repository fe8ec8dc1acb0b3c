"""A vector in activation space, and its birth."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
