"""Interventions with their scopes: the file that travels."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
