"""A model over HTTP, as OpenAI's clients ask for it, where each request may name a recipe."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
