"""The stream as the unembedding reads it: what each layer would say next, and who wrote a logit."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
