"""Read a model: sites, activations, directions. Nothing here changes a logit."""

from probes.completions import Completion, read_completions, write_completions
from probes.directions import Direction, difference_in_means, direction_between
from probes.generation import generate
from probes.heads import HeadScores, head_writes
from probes.hooks import attached, captured
from probes.models import load
from probes.sampling import Sampling
from probes.sites import Site

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
