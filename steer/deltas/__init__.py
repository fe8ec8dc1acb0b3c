"""Differences in weight space: made, added, dialled, stored."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    __file__,
    {"Derived": "NullDelta", "Edit": "RecipeDelta", "Source": "DeltaSource", "edit_delta": "recipe_delta"},
)
