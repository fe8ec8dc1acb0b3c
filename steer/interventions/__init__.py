"""What is done at a site, to a router's choice, or to what heads attend to."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
