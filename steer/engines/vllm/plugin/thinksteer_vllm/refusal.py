"""What a recipe, a setting or an engine is refused with: a sentence of what was given, what is known, what to do."""


class Refused(ValueError):
    """Said at start: the engine does not come up."""
