"""Where a recipe runs, other than in plain Hugging Face code, and the gate that proves all of it alike."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
