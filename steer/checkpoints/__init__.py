"""Folders of weights on disk: opened, compared, described, pushed."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__, {"Place": "TensorInfo"})
