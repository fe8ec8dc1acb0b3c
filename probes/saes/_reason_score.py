"""ReasonScore: the latents that fire around the words of reasoning (Galichin et al. 2025)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probes.model.loading import tokenizer_of
from probes.model.tokens import spellings
from probes.saes.inference import RATE, Differences
from probes.saes.reading import CHUNK_BYTES, class_moments
from probes.saes.sae import Autoencoder
from probes.tables import Shown, Table
from probes.thinking.spans import Span

Words = Mapping[str, Sequence[str]]


def _forms(word: str) -> tuple[str, ...]:
    both = (word, word.capitalize())
    return tuple(space + form for form in both for space in ("", " "))


WORDS: Words = {
    **{w: _forms(w) for w in ("alternatively", "hmm", "maybe", "wait", "perhaps", "let me", "therefore", "however")},
    "But": ("But",),
    "Another": ("Another",),
}
"""The ten words of the paper in their 34 forms: eight with either capital and with or without a space before it."""


@dataclass(frozen=True, eq=False, repr=False)
class ReasonScores(Shown):
    """Of every latent: the score, its parts, and whether it fires more in the windows than outside, text by text.

    `score` = mean in the windows, over the sum of that of all latents, times entropy^alpha, less the mean elsewhere,
    over its sum. `entropy`: how evenly the words share its mean, 0 to 1. `inside` says, over texts, how much
    more it fires in the windows; `firing` counts the tokens in which it was active.

    >>> from probes import generate, load
    >>> from probes.saes import SparseAutoencoder, reason_score
    >>> from probes.thinking import thinking
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=128, k=8)
    >>> spans = [thinking(c) for c in generate(model, ["a 3 b +4 c *7", "a 5 b *2 c +1 d *3"])]
    >>> scores = reason_score(model, sae, spans, words={"equals": ["=7"], "okay": ["Okay"]})
    >>> len(scores.top(3)), scores.words
    (3, ('equals', 'okay'))
    """

    score: Float[Tensor, " d_sae"]
    entropy: Float[Tensor, " d_sae"]
    in_windows: Float[Tensor, " d_sae"]
    elsewhere: Float[Tensor, " d_sae"]
    inside: Differences
    firing: Float[Tensor, " d_sae"]
    n_tokens: int
    n_marked: int
    words: tuple[str, ...]
    absent: tuple[str, ...]

    def top(self, count: int = 20) -> list[int]:
        """The latents of the largest scores, the largest first."""
        return [int(i) for i in self.score.topk(min(count, len(self.score))).indices]

    def above(self, quantile: float = 0.997) -> list[int]:
        """Those above a quantile of all scores, as the paper chooses them."""
        bar = torch.quantile(self.score.float(), quantile)
        return [i for i in self.top(len(self.score)) if self.score[i] > bar]

    def declared(self, rate: float = RATE) -> list[int]:
        """Those that fire more in the windows, at a rate of false discoveries, by score."""
        more = self.inside.declared(rate) & (self.inside.mean > 0)
        return [i for i in self.top(len(self.score)) if more[i]]

    def table(self, count: int = 20) -> Table:
        low, high = self.inside.interval()
        q = self.inside.q()
        rows = tuple(
            (
                i,
                float(self.score[i]),
                float(self.entropy[i]),
                float(self.in_windows[i]),
                float(self.elsewhere[i]),
                f"{self.inside.mean[i]:.3f} [{low[i]:.3f}, {high[i]:.3f}]",
                float(q[i]),
                float(self.firing[i]) / self.n_tokens,
            )
            for i in self.top(count)
        )
        columns = (
            "latent",
            "score",
            "entropy",
            "in windows",
            "elsewhere",
            "more inside, by text [95 %]",
            "q",
            "fires in",
        )
        title = (
            f"ReasonScore over {self.n_tokens:,} tokens of {self.inside.n} texts, {self.n_marked:,} in windows of "
            f"{len(self.words)} words; {len(self.declared())} of {len(self.score):,} latents declared at q <= {RATE}"
        )
        return Table(columns, rows, title)


@torch.no_grad()
def reason_score(
    model: PreTrainedModel,
    sae: Autoencoder,
    spans: Sequence[Span],
    *,
    words: Words = WORDS,
    window: tuple[int, int] = (2, 3),
    alpha: float = 0.7,
    keep_sinks: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> ReasonScores:
    """ReasonScore (Galichin et al. 2025) of every latent over the spans of some texts.

    A word's window reaches `window` tokens before and after what spells it (the paper's 2 and 3). Activations are those
    times the norm of the decoder's row, as the paper folds it. All latents are in the sums that normalise, however the
    work is cut. Beyond the paper: sinks are left out, unless `keep_sinks`, and each latent is tested over texts,
    which bounds the share of false ones among those that are declared. Raises ValueError where no word occurs.

    >>> from probes import generate, load
    >>> from probes.saes import SparseAutoencoder, reason_score
    >>> from probes.thinking import thinking
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=128, k=8)
    >>> spans = [thinking(c) for c in generate(model, ["a 3 b +4 c *7", "a 5 b *2 c +1 d *3"])]
    >>> reason_score(model, sae, spans, words={"equals": ["="], "okay": ["Okay"]}).n_marked > 0
    True
    """
    found, absent = _spelled(tokenizer_of(model), words)
    masks = [_classes(span, list(found.values()), window) for span in spans]
    n, d_sae = len(found), sae.d_sae
    total, count = torch.zeros(n + 2, d_sae, dtype=torch.float64), torch.zeros(n + 2, dtype=torch.long)
    firing, inside = torch.zeros(d_sae, dtype=torch.float64), Differences.none(d_sae)
    norms = sae.decoder.float().norm(dim=1)
    moments = class_moments(model, sae, spans, masks, keep_sinks=keep_sinks, chunk_bytes=chunk_bytes)
    for text in moments:
        total += (text.total * norms).double().cpu()
        count += text.count.cpu()
        firing += text.active[-2:].sum(0).double().cpu()
        if bool(text.count[-2:].all()):
            inside.add((text.mean[-2] - text.mean[-1]) * norms)
    if not count[-2]:
        raise ValueError(
            f"None of the words occurs in the {len(spans)} spans: {', '.join(words)}. Give texts that reason, or words."
        )
    mean = total / count[:, None].clamp(min=1)
    score, entropy = score_of(mean[:n], mean[-2], mean[-1], alpha=alpha)
    return ReasonScores(
        score, entropy, mean[-2], mean[-1], inside, firing, int(count[-2:].sum()), int(count[-2]), tuple(found), absent
    )


def score_of(
    by_word: Float[Tensor, "words d_sae"],
    in_windows: Float[Tensor, " d_sae"],
    elsewhere: Float[Tensor, " d_sae"],
    *,
    alpha: float = 0.7,
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """The score and the entropy, of mean activations."""
    share = by_word / by_word.sum(0).clamp(min=1e-12)
    entropy = -torch.special.xlogy(share, share).sum(0) / math.log(max(len(by_word), 2))
    marked = in_windows / in_windows.sum().clamp(min=1e-12)
    score = marked * entropy.clamp(min=0).pow(alpha) - elsewhere / elsewhere.sum().clamp(min=1e-12)
    return score, entropy


def windows(ids: Sequence[int], spelled: Sequence[tuple[int, ...]], window: tuple[int, int]) -> Bool[Tensor, " pos"]:
    """The positions of what is spelled by one of these id sequences, and `window` tokens before and after."""
    mask, row = torch.zeros(len(ids), dtype=torch.bool), torch.tensor(ids)
    for word in spelled:
        if len(word) > len(ids):
            continue
        hit = (row.unfold(0, len(word), 1) == torch.tensor(word)).all(1).nonzero()[:, 0]
        for start in hit.tolist():
            mask[max(0, start - window[0]) : start + len(word) + window[1]] = True
    return mask


def _classes(
    span: Span, words: Sequence[Sequence[tuple[int, ...]]], window: tuple[int, int]
) -> Bool[Tensor, "classes pos"]:
    """A row for each word, and then all of them together, and none."""
    rows = torch.stack([windows(span.ids, spelled, window) for spelled in words])
    marked = rows.any(0)
    return torch.cat([rows, marked[None], ~marked[None]])


def _spelled(
    tokenizer: PreTrainedTokenizerBase, words: Words
) -> tuple[dict[str, list[tuple[int, ...]]], tuple[str, ...]]:
    """Each word's forms as ids, and the words that the vocabulary cannot spell."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for word, forms in words.items():
        if kept := spellings(tokenizer, forms, {form.strip(" ") for form in forms}):
            found[word] = kept
    if not found:
        raise ValueError(f"The vocabulary can spell none of the words: {', '.join(words)}.")
    return found, tuple(word for word in words if word not in found)
