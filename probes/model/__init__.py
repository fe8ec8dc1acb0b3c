"""A loaded model: what it is, and where its places are."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__, {"place_of": "resolve"})
