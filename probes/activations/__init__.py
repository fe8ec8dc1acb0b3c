"""What the model holds: activations, heads' writes and routing, reduced as they are read."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
