"""Where latents fire most: the tokens, what stands around them, and how strongly each of those fires, too."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probes.model.tokens import decode
from probes.saes.reading import CHUNK_BYTES, streamed
from probes.saes.sae import Autoencoder
from probes.tables import Brief
from probes.thinking.spans import Span


@dataclass(frozen=True, repr=False)
class Context(Brief):
    """One place where a latent fires: `text` numbers the span, `position` is in it, `start` is where `ids` begin.

    >>> from probes import load
    >>> from probes.model import tokenizer_of
    >>> from probes.saes import SparseAutoencoder, top_contexts
    >>> from probes.thinking import text_span
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=64, k=8)
    >>> contexts = top_contexts(model, sae, [0, 1, 2, 3], [text_span(model, "a 3 b +4 c *7")], count=1)
    >>> context = next(found[0] for found in contexts.values() if found)
    >>> context.activations[context.position - context.start] == max(context.activations)
    True
    """

    text: int
    position: int
    start: int
    ids: tuple[int, ...]
    activations: tuple[float, ...]

    @property
    def peak(self) -> float:
        """How strongly it fires there."""
        return self.activations[self.position - self.start]

    def marked(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text around, the token itself in angle brackets."""
        at = self.position - self.start
        before, token, after = (
            decode(tokenizer, part) for part in (self.ids[:at], self.ids[at : at + 1], self.ids[at + 1 :])
        )
        return f"{before}⟨{token}⟩{after}"


@torch.no_grad()
def top_contexts(
    model: PreTrainedModel,
    sae: Autoencoder,
    latents: Sequence[int],
    spans: Sequence[Span],
    *,
    count: int = 8,
    around: tuple[int, int] = (20, 8),
) -> dict[int, tuple[Context, ...]]:
    """Of each latent the places where it fires most, at most one a text, the strongest first.

    `around`: how many tokens before and after are shown. Attention sinks do not count. Nothing is kept but what is
    shown.

    >>> from probes import load
    >>> from probes.saes import SparseAutoencoder, top_contexts
    >>> from probes.thinking import text_span
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=64, k=8)
    >>> list(top_contexts(model, sae, [3, 5], [text_span(model, "a 3 b +4 c *7")]))
    [3, 5]
    """
    best: dict[int, list[tuple[float, int, Context]]] = {latent: [] for latent in latents}
    step = max(1, CHUNK_BYTES // (4 * sae.d_sae))
    for read in streamed(model, spans, sae.site, device=sae.decoder.device, label="finding contexts"):
        parts = [sae.encode_at(read.x[start : start + step], latents) for start in range(0, len(read.x), step)]
        f = (torch.cat(parts) * read.used[:, None]).cpu()
        for held, column in zip(best.values(), f.unbind(1), strict=True):
            at = int(column.argmax())
            peak = float(column[at])
            if peak <= 0 or (len(held) == count and peak <= held[0][0]):
                continue
            low, high = max(0, at - around[0]), at + 1 + around[1]
            ids = spans[read.number].ids[low:high]
            context = Context(read.number, at, low, tuple(ids), tuple(column[low:high].tolist()))
            (heapq.heappush if len(held) < count else heapq.heapreplace)(held, (peak, -read.number, context))
    return {
        latent: tuple(context for *_, context in sorted(held, key=lambda row: row[:2], reverse=True))
        for latent, held in best.items()
    }
