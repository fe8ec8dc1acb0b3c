"""Does a latent mark reasoning, or its words? Cues put into other text, and reasoning told without them.

Latents that are chosen because they fire at "wait" and "therefore" may do no more than that: of such features 45 to
90 % fire as well when these words are strewn over text that does not reason (Ma et al. 2026). So each is asked twice.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.model.loading import tokenizer_of
from probes.saes.inference import RATE, p_of, q_of
from probes.saes.reading import streamed
from probes.saes.sae import Autoencoder
from probes.tables import Shown, Table
from probes.thinking.spans import Span

Verdict = Literal["word", "phase", "both", "neither"]
SHARE = 0.5
"""A latent follows the words, or the phase, where it keeps at least this share of what it does in reasoning text."""


@dataclass(frozen=True, eq=False, repr=False)
class Verdicts(Shown):
    """Of each latent: its mean over reasoning text, other text, other text with cues, and reasoning without them.

    All over texts, [kinds latents]; the difference from other text is tested by Welch's t, over all latents together at
    one rate of false discoveries. A latent is a `word` where cues alone bring it out, a `phase` where reasoning does
    without them, `both`, or `neither`.

    >>> from probes import load
    >>> from probes.saes import SparseAutoencoder, verdicts
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=64, k=8)
    >>> told = verdicts(model, sae, [0], ["Okay a =3 b +4", "Okay a =5 b *2"], ["a 3 b +4", "a 5 b *2"], cues=["Okay"])
    >>> told.n, told.mean.shape
    ((2, 2, 2, 2), torch.Size([4, 1]))
    """

    latents: tuple[int, ...]
    n: tuple[int, int, int, int]
    mean: Float[Tensor, "kinds latents"]
    error: Float[Tensor, "kinds latents"]
    q: Float[Tensor, "tests latents"]
    cues: tuple[str, ...]

    @property
    def by_cue(self) -> Float[Tensor, " latents"]:
        """How much of what it does in reasoning text, beyond other text, cues alone bring out; 0 where it does none."""
        return self._share(2)

    @property
    def without_cues(self) -> Float[Tensor, " latents"]:
        """How much of it stays where the cues are taken out."""
        return self._share(3)

    def verdict(self, latent: int) -> Verdict:
        """Raises ValueError for a latent that was not asked about."""
        if latent not in self.latents:
            raise ValueError(f"Latent {latent} was not asked about. Known: {', '.join(map(str, self.latents))}.")
        at = self.latents.index(latent)
        reasons = bool(self.q[0, at] <= RATE) and float(self.mean[0, at] - self.mean[1, at]) > 0
        word = bool(self.q[1, at] <= RATE) and float(self.by_cue[at]) >= SHARE
        phase = bool(self.q[2, at] <= RATE) and float(self.without_cues[at]) >= SHARE
        if not reasons:
            return "neither"
        return "both" if word and phase else "word" if word else "phase" if phase else "neither"

    def table(self) -> Table:
        rows = tuple(
            (
                latent,
                *(float(m) for m in self.mean[:, i]),
                float(self.by_cue[i]),
                float(self.without_cues[i]),
                *(float(q) for q in self.q[:, i]),
                self.verdict(latent),
            )
            for i, latent in enumerate(self.latents)
        )
        columns = (
            "latent", "reasoning", "other", "other, cues", "reasoning, no cues", "by cues alone", "stays without",
            "q", "q of cues", "q without", "verdict",
        )  # fmt: skip
        title = f"Means over {self.n[0]}, {self.n[1]}, {self.n[2]} and {self.n[3]} texts; cues: {', '.join(self.cues)}"
        return Table(columns, rows, title)

    def _share(self, kind: int) -> Tensor:
        whole = self.mean[0] - self.mean[1]
        told = whole > 0
        return ((self.mean[kind] - self.mean[1]) / whole.where(told, torch.ones_like(whole))).where(told, 0 * whole)


def verdicts(
    model: PreTrainedModel,
    sae: Autoencoder,
    latents: Sequence[int],
    reasoning: Sequence[str],
    other: Sequence[str],
    *,
    cues: Sequence[str] = ("Wait", "Hmm", "Alternatively", "Therefore", "But"),
    paraphrased: Sequence[str] | None = None,
    density: int = 12,
    seed: int = 0,
) -> Verdicts:
    """Ask of each latent whether it follows the cues, the reasoning, both or neither (Ma et al. 2026).

    `other` are texts that do not reason; into copies of them a cue is put before every `density`-th word or so, at
    random. `paraphrased` are reasoning texts that do without cues; if none are given, `reasoning` without its cues.
    A text's value is its mean over all its tokens. Raises ValueError where there are fewer than two texts of a kind.

    >>> from probes import load
    >>> from probes.saes import SparseAutoencoder, verdicts
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=64, k=8)
    >>> chains = ["Okay a =3 b +4 =7", "Okay a =5 b *2 =1", "Okay a =2 b +2 =4"]
    >>> told = verdicts(model, sae, [0, 1], chains, ["a 3 b +4", "a 5 b *2", "a 2 b +2"], cues=["Okay"], density=2)
    >>> told.verdict(0) in ("word", "phase", "both", "neither")
    True
    """
    rng = random.Random(seed)
    with_cues = [injected(text, cues, density, rng) for text in other]
    without = list(paraphrased) if paraphrased is not None else [deleted(text, cues) for text in reasoning]
    kinds = (list(reasoning), list(other), with_cues, [text for text in without if text.strip()])
    for name, texts in zip(("reasoning", "other", "cued", "paraphrased"), kinds, strict=True):
        if len(texts) < 2:
            raise ValueError(f"A verdict needs at least two {name} texts, but got {len(texts)}.")
    values = [_values(model, sae, latents, texts) for texts in kinds]
    mean = torch.stack([v.mean(0) for v in values])
    spread = torch.stack([v.var(0) / len(v) for v in values])
    tests = torch.stack([_welch(values[i], values[1]) for i in (0, 2, 3)])
    q = q_of(tests.flatten()).view_as(tests)
    n0, n1, n2, n3 = (len(v) for v in values)
    return Verdicts(tuple(latents), (n0, n1, n2, n3), mean, spread.sqrt(), q, tuple(cues))


def injected(text: str, cues: Sequence[str], density: int, rng: random.Random) -> str:
    """The text with a cue before every `density`-th word or so, at random; at least one."""
    words = text.split(" ")
    at = [i for i in range(len(words)) if rng.random() < 1 / density] or [rng.randrange(len(words))]
    for i in at:
        words[i] = f"{rng.choice(list(cues))} {words[i]}"
    return " ".join(words)


def deleted(text: str, cues: Sequence[str]) -> str:
    """The text without the cues, in either capital, and without the comma that follows one."""
    listed = "|".join(re.escape(cue) for cue in sorted(cues, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{listed})(?!\w)[,.]? ?", "", text, flags=re.IGNORECASE)


@torch.no_grad()
def _values(
    model: PreTrainedModel, sae: Autoencoder, latents: Sequence[int], texts: Sequence[str]
) -> Float[Tensor, "texts latents"]:
    tokenizer = tokenizer_of(model)
    rows = [tuple(int(i) for i in tokenizer.encode(text)) for text in texts]
    found = torch.zeros(len(rows), len(latents), dtype=torch.float64)
    spans, device = [Span(ids, 0, len(ids)) for ids in rows], sae.decoder.device
    for read in streamed(model, spans, sae.site, device=device, label="reading controls"):
        found[read.number] = sae.encode_at(read.x[read.used], latents).double().mean(0).cpu()
    return found


def _welch(a: Tensor, b: Tensor) -> Float[Tensor, " latents"]:
    """The two-sided p of one mean, by the smaller number of texts, which is the more careful of the two."""
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    return p_of(a.mean(0) - b.mean(0), error, min(len(a), len(b)))
