"""A recipe in the weights: folded, exported as a checkpoint or as a LoRA adapter."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
