"""How often each latent is active, and how strongly: what a clamp is measured in, and what a null is matched by."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._record import record
from probes.directions.direction import Direction
from probes.directions.provenance import Provenance
from probes.saes.reading import class_moments
from probes.saes.sae import Autoencoder
from probes.tables import Brief
from probes.thinking.spans import Span


@dataclass(frozen=True, eq=False, repr=False)
class LatentUsage(Brief):
    """Of every latent: the share of tokens in which it is active, its mean over all, and its largest activation.

    >>> from probes import load
    >>> from probes.saes import SparseAutoencoder, latent_usage
    >>> from probes.thinking import text_span
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=64, k=8)
    >>> usage = latent_usage(model, sae, [text_span(model, "a 3 b +4 c *7")])
    >>> round(float(usage.frequency.sum())), usage.like([3], seed=0) != [3]
    (8, True)
    """

    frequency: Float[Tensor, " d_sae"]
    mean: Float[Tensor, " d_sae"]
    largest: Float[Tensor, " d_sae"]
    tokens: int

    def like(self, latents: Sequence[int], *, seed: int, near: int = 20) -> list[int]:
        """For each latent another one, at random among the `near` that are active about as often; none twice.

        Raises ValueError where too few latents are ever active.
        """
        rng, taken = random.Random(seed), set(latents)
        alive = [int(i) for i in (self.frequency > 0).nonzero()[:, 0]]
        drawn = []
        for latent in latents:
            others = sorted(
                (i for i in alive if i not in taken),
                key=lambda i: abs(float((self.frequency[i] / self.frequency[latent].clamp(min=1e-9)).log())),
            )
            if not others:
                raise ValueError(
                    f"Only {len(alive)} latents are ever active: there is none left to stand for {latent}."
                )
            drawn.append(rng.choice(others[:near]))
            taken.add(drawn[-1])
        return drawn


def latent_usage(model: PreTrainedModel, sae: Autoencoder, spans: Sequence[Span]) -> LatentUsage:
    """Over the spans, attention sinks left out.

    >>> from probes import load
    >>> from probes.saes import SparseAutoencoder, latent_usage
    >>> from probes.thinking import text_span
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=64, k=8)
    >>> latent_usage(model, sae, [text_span(model, "a 3 b +4 c *7")]).tokens
    5
    """
    every = [torch.ones(1, len(span.ids), dtype=torch.bool) for span in spans]
    total, active, largest = (torch.zeros(sae.d_sae, dtype=torch.float64) for _ in range(3))
    tokens = 0
    for text in class_moments(model, sae, spans, every):
        total += text.total[0].double().cpu()
        active += text.active[0].double().cpu()
        largest = torch.maximum(largest, text.largest[0].double().cpu())
        tokens += int(text.count[0])
    n = max(tokens, 1)
    return LatentUsage(active / n, total / n, largest, tokens)


def latent_direction(model: PreTrainedModel, sae: Autoencoder, latent: int, spans: Sequence[Span]) -> Direction:
    """The decoder row of a latent as a direction at the site that it writes to, in the model's units.

    `spans` say how long the stream is there, which strengths are measured by. Raises ValueError for a latent that it
    has not.

    >>> from probes import load
    >>> from probes.saes import latent_direction, load_sae
    >>> from probes.thinking import text_span
    >>> model = load("organism")
    >>> direction = latent_direction(model, load_sae("organism-L1"), 3, [text_span(model, "a 3 b +4 c *7")])
    >>> str(direction.site), direction.provenance.estimator
    ('L1.resid_post', 'decoder row of latent 3')
    """
    if not 0 <= latent < sae.d_sae:
        raise ValueError(f"Latent {latent} is not one of the {sae.d_sae:,} latents, 0 to {sae.d_sae - 1}.")
    site = sae.out_site
    norm = record(model, spans, [site])[site].norm.mean
    birth = Provenance.now(model, f"decoder row of latent {latent}", spans, [])
    row = sae.decoder[latent] * sae.unit
    return Direction(site, row.float().cpu(), float(norm), birth)
