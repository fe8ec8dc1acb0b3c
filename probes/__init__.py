"""Read a model: sites, activations, directions. Nothing here changes a logit."""

from probes.activations.heads import HeadScores, head_writes
from probes.directions.direction import Direction, difference_in_means, direction_between
from probes.generation._generate import generate
from probes.generation.completions import Completion, read_completions, write_completions
from probes.generation.sampling import Sampling
from probes.model.hooks import attached, captured
from probes.model.loading import load
from probes.model.sites import Site

__all__ = [
    "Completion",
    "Direction",
    "HeadScores",
    "Sampling",
    "Site",
    "attached",
    "captured",
    "difference_in_means",
    "direction_between",
    "generate",
    "head_writes",
    "load",
    "read_completions",
    "write_completions",
]
