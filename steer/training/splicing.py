"""A site's activation replaced by what an autoencoder makes of it, and what the model loses by that."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from probes.activations._record import batches, padded
from probes.activations.reduction import kept
from probes.model.architectures import device_at
from probes.model.hooks import attached
from probes.model.sites import Site
from probes.saes.sae import SparseAutoencoder
from probes.tables import Shown, Table
from probes.thinking.spans import Span


@contextmanager
def spliced(model: PreTrainedModel, sae: SparseAutoencoder, *, through: bool = True) -> Iterator[None]:
    """While open, the activation at the autoencoder's site is its reconstruction, without what it does not explain.

    `through`: gradients pass the autoencoder to the layers below; else they end there, as in Resa's released code
    (Wang et al. 2025). Raises ValueError for a transcoder.

    >>> import torch
    >>> from probes import load
    >>> from probes.saes import SparseAutoencoder
    >>> from steer.training import spliced
    >>> model, ids = load("organism"), torch.tensor([[1, 6, 17, 5]])
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=64, k=4)
    >>> plain = model(ids).logits
    >>> with spliced(model, sae):
    ...     torch.equal(model(ids).logits, plain)
    False
    """
    site = _site(sae)
    sae = sae.to(device_at(model, site.layer))

    def reconstruct(x: Tensor) -> Tensor:
        if through:
            return sae(x).to(x.dtype)
        with torch.no_grad():
            return sae(x).to(x.dtype)

    with attached(model, site, reconstruct, name=f"spliced: {sae!r}"):
        yield


@dataclass(frozen=True, repr=False)
class RecoveredLoss(Shown):
    """The mean cross-entropy of the next token, in nats: of the model, spliced, and with the site at its mean.

    `recovered` = (ablated - spliced) / (ablated - plain): 1 loses nothing, 0 is as bad as the mean.

    >>> from steer.training import RecoveredLoss
    >>> RecoveredLoss(plain=1.0, spliced=1.5, ablated=3.0, tokens=100).recovered
    0.75
    """

    plain: float
    spliced: float
    ablated: float
    tokens: int

    @property
    def recovered(self) -> float:
        lost = self.ablated - self.plain
        return (self.ablated - self.spliced) / lost if lost else 1.0

    def table(self) -> Table:
        rows = tuple((name, float(getattr(self, name))) for name in ("plain", "spliced", "ablated", "recovered"))
        return Table(("cross-entropy", "nats"), rows, f"Over {self.tokens:,} tokens; the last is a share")


@torch.no_grad()
def recovered_loss(
    model: PreTrainedModel, sae: SparseAutoencoder, spans: Sequence[Span], *, batch_tokens: int = 4_096
) -> RecoveredLoss:
    """What is lost of the model's predictions where an autoencoder's reconstruction stands for its site.

    Attention sinks keep their activation, which the autoencoder was not made for; ablated, the site is its mean over a
    batch. Loss is counted over the spans. Raises ValueError for a transcoder.

    >>> from probes import generate, load
    >>> from probes.saes import SparseAutoencoder
    >>> from probes.thinking import thinking
    >>> from steer.training import recovered_loss
    >>> model = load("organism")
    >>> spans = [thinking(completion) for completion in generate(model, ["a 3 b +4 c *7", "a 5 b *2 c +1"])]
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=64, k=4)
    >>> recovered_loss(model, sae, spans).recovered < 1
    True
    """
    site, sums, n = _site(sae), [0.0, 0.0, 0.0], 0
    sae = sae.to(device_at(model, site.layer))
    with tqdm(total=len(spans), desc="splicing", unit="text", delay=2, leave=False) as bar:
        for rows in batches(model, spans, batch_tokens):
            ids, real = padded([spans[row].ids for row in rows])
            wanted = torch.zeros_like(real)
            for i, row in enumerate(rows):
                wanted[i, max(spans[row].start, 1) : spans[row].stop] = True
            ids, real, wanted = (part.to(model.device) for part in (ids, real, wanted))

            def edit(x: Tensor, *, ablated: bool, real: Tensor = real) -> Tensor:
                wide = x.float()
                keep = ~kept(wide, wide.norm(dim=-1), real, real, site)
                new = wide[~keep].mean(0).expand_as(wide) if ablated else sae(wide)
                return torch.where(keep[..., None], wide, new).to(x.dtype)

            sums[0] += _loss(model, ids, real, wanted)
            for place, at_mean in ((1, False), (2, True)):
                with attached(model, site, partial(edit, ablated=at_mean)):
                    sums[place] += _loss(model, ids, real, wanted)
            n += int(wanted.sum())
            bar.update(len(rows))
    plain, with_sae, ablated = (total / max(n, 1) for total in sums)
    return RecoveredLoss(plain, with_sae, ablated, n)


def _loss(model: PreTrainedModel, ids: Tensor, real: Tensor, wanted: Tensor) -> float:
    logits: Float[Tensor, "batch pos d_vocab"] = model(input_ids=ids, attention_mask=real.long()).logits[:, :-1].float()
    told = wanted[:, 1:]
    return float(cross_entropy(logits[told], ids[:, 1:][told], reduction="sum"))


def _site(sae: SparseAutoencoder) -> Site:
    if sae.is_transcoder:
        raise ValueError(f"{sae!r} reads one site and writes another: it has no activation to stand for.")
    return sae.site
