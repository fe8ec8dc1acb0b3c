"""Change a model: interventions at run time, and the same interventions folded into weights."""

from importlib.metadata import version

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
__version__ = version("thinksteer")
