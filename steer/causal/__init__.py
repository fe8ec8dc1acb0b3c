"""What causes an output: activations patched in from another run, parts knocked out, and parts that work together."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
