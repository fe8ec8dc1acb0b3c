"""Where the forward pass runs: what writes tokens in place of transformers."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
