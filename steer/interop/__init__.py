"""Recipes in the files of other tools, and back."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
