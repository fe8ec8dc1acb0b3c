"""What is done at a site, or to a router's choice."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
