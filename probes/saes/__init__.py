"""Sparse autoencoders and transcoders: read, checked against the model, trained, and what their latents mark."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
