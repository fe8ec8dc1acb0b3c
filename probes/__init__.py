"""Read a model: sites, activations, directions. Nothing here changes a logit."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
