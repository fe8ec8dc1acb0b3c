"""Arms on one set of problems: accuracy, length and truncation, paired, beside their nulls."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__, {"Contrast": "LabelledDirection"})
