"""A chain of thought in token ids: its phases, its segments, and the spans that are read."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
