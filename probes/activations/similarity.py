"""How much the thoughts of one chain are alike: redundancy within it."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._record import span_means
from probes.generation.completions import Completion
from probes.model.architectures import n_layers
from probes.model.sites import Site
from probes.thinking._segments import Segment
from probes.thinking.spans import Span

Embed = Callable[[Completion, Sequence[Segment]], Float[Tensor, "thoughts width"]]


def internal_redundancy(
    model: PreTrainedModel,
    completion: Completion,
    found: Sequence[Segment],
    *,
    window: int = 3,
    embed: Embed | None = None,
) -> float:
    """The mean cosine of each thought with the `window` - 1 before it *(after Hong et al. 2025)*.

    `found` are the thoughts that count: those up to the first correct solution are within a chain's own work
    (`probes.thinking.chain_redundancy` numbers it). A thought is the mean of its activations at the output of the
    middle layer, less the mean over the chain, which all its thoughts share; or what `embed` makes of it, as it is.
    NaN for fewer than two thoughts. Raises ValueError for a window below 2.

    >>> import torch
    >>> from probes import generate, load
    >>> from probes.activations import internal_redundancy
    >>> from probes.thinking import segments
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> thoughts = segments(model, completion, "organism")
    >>> round(internal_redundancy(model, completion, thoughts, embed=lambda c, found: torch.ones(len(found), 2)), 2)
    1.0
    >>> round(internal_redundancy(model, completion, thoughts), 2)
    -0.47
    """
    if window < 2:
        raise ValueError(f"A window of {window} thoughts holds nothing to compare: give 2 or more.")
    if len(found) < 2:
        return math.nan
    x = (_states(model, completion, found) if embed is None else embed(completion, found)).double()
    unit = torch.nn.functional.normalize(x, dim=-1)
    cosine = unit @ unit.T
    back = torch.arange(len(x))[:, None] - torch.arange(len(x))
    return float(cosine[(back > 0) & (back < window)].mean())


def _states(model: PreTrainedModel, completion: Completion, found: Sequence[Segment]) -> Float[Tensor, "thoughts d"]:
    site = Site((n_layers(model) - 1) // 2, "resid_post")
    spans = [Span(completion.all_ids, s.start, s.stop) for s in found]
    means = torch.cat(
        [batch.means[site][torch.tensor(batch.rows).argsort()] for batch in span_means(model, spans, [site])]
    )
    return means - means.mean(0)
