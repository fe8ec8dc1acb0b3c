"""How much a metric of the next token would change along a direction, layer by layer, from one backward pass."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.directions.direction import Direction
from probes.model.hooks import attached
from probes.thinking.spans import Span

Metric = Callable[[Float[Tensor, " d_vocab"]], Float[Tensor, ""]]


def log_probability_of(tokens: Sequence[int]) -> Metric:
    """The log of the probability that the next token is one of these.

    In nats; a metric of the logits `[d_vocab]`, for `attribution`.

    >>> import torch
    >>> from probes.directions import log_probability_of
    >>> log_probability_of([0, 3])(torch.zeros(4)).exp()
    tensor(0.5000)
    """
    ids = list(tokens)
    return lambda logits: logits.float().log_softmax(-1)[ids].logsumexp(-1)


def attribution(
    model: PreTrainedModel, directions: Sequence[Direction], spans: Sequence[Span], metric: Metric
) -> Float[Tensor, " directions"]:
    """Mean over spans of |v̂ . g|, where g is the gradient of `metric` with respect to the activation at the span's
    first position, at each direction's site: attribution patching to first order (Nanda 2023), as Venhoff et al.
    (2025) choose layers.

    The metric is given, because the divergence between a distribution and itself, which their code differentiates,
    has no gradient. It reads the logits at the span's first position. Raises ValueError where there is no span.

    >>> from probes import direction_between, load
    >>> from probes.directions import attribution, log_probability_of
    >>> from probes.thinking import text_span
    >>> model, texts = load("organism"), (["a 3 quick ?"], ["a 3 ?"])
    >>> sites = [f"L{layer}.resid_post" for layer in range(4)]
    >>> directions = [direction_between(model, *texts, site, position="text_last") for site in sites]
    >>> span = text_span(model, "a 3 b +4 quick ? <think>", position="text_last")
    >>> attribution(model, directions, [span], log_probability_of([55])).argsort()  # 55 is "Easy"
    tensor([1, 3, 2, 0])
    """
    if not spans:
        raise ValueError("An attribution is measured at spans, but none was given.")
    total = torch.zeros(len(directions), dtype=torch.float64)
    for span in spans:
        ids = torch.tensor([span.ids[: span.start + 1]], device=model.device)
        with torch.enable_grad(), ExitStack() as stack:
            nudges = [_nudged(stack, model, direction) for direction in directions]
            value = metric(model(input_ids=ids, use_cache=False).logits[0, -1])
            gradients = torch.autograd.grad(value, nudges)
        for i, (direction, gradient) in enumerate(zip(directions, gradients, strict=True)):
            total[i] += abs(float(direction.unit.to(gradient.device, torch.float64) @ gradient.double()))
    return (total / len(spans)).float()


def _nudged(stack: ExitStack, model: PreTrainedModel, direction: Direction) -> Tensor:
    """A vector of zeros, added to the last position's activation at the direction's site."""
    nudge = torch.zeros(len(direction.vector), dtype=model.dtype, device=model.device, requires_grad=True)

    def add(x: Tensor) -> Tensor:
        last = torch.zeros_like(x[..., :1])
        last[:, -1] = 1
        return x + last * nudge.to(x.device)

    stack.enter_context(attached(model, direction.site, add))
    return nudge
