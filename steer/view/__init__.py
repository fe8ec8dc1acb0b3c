"""A chain of thought token by token, with all that was read along it, as a page that needs no network."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
