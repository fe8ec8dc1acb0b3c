"""What of the logits is looked at: one number of a run, or one for each prompt's own."""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

Metric = Callable[[Float[Tensor, " d_vocab"]], Float[Tensor, ""]]


def logit_difference(token: int, against: int) -> Metric:
    """The logit of one token less that of another: the metric of most patching studies *(Wang et al. 2023)*.

    Of the logits `[d_vocab]` after the last token; `probes.directions.log_probability_of` is another metric.

    >>> import torch
    >>> from steer.causal import logit_difference
    >>> logit_difference(0, against=2)(torch.tensor([3.0, 0.0, 1.0]))
    tensor(2.)
    """
    return lambda logits: logits[token] - logits[against]


def metrics_of(metric: Metric | Sequence[Metric], prompts: int) -> list[Metric]:
    """One for each prompt. Raises ValueError where their numbers differ."""
    if not isinstance(metric, Sequence):
        return [metric] * prompts
    if len(metric) != prompts:
        raise ValueError(f"{len(metric)} metrics came with {prompts} prompts: give one, or one for each.")
    return list(metric)
