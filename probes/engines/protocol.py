"""What an engine is: `generate` and `evaluate` take any, and know none by name."""

from probes.generation.engine import Engine, Row, Written

__all__ = ["Engine", "Row", "Written"]
