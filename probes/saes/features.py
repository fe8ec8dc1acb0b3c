"""Latents that tell phases apart, or mark the delimiters of thinking alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.generation.completions import Completion
from probes.model.loading import delimiters_of
from probes.saes._reason_score import windows
from probes.saes.inference import RATE, Differences
from probes.saes.reading import class_moments, streamed
from probes.saes.sae import Autoencoder
from probes.tables import Shown, Table
from probes.thinking._segments import Segment
from probes.thinking.phases import PHASES, Clock
from probes.thinking.spans import Span


@dataclass(frozen=True, eq=False, repr=False)
class LatentContrast(Shown):
    """Of every latent, how much more it fires in class a than in class b, over texts that hold both.

    >>> from probes import generate, load
    >>> from probes.saes import SparseAutoencoder, phase_contrast
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=64, k=8)
    >>> contrast = phase_contrast(model, sae, generate(model, ["a 3 b +4 c *7", "a 5 b *2 c +1"]))
    >>> contrast.mean.shape, contrast.difference.n
    (torch.Size([2, 64]), 2)
    """

    classes: tuple[str, str]
    mean: Float[Tensor, "classes d_sae"]
    frequency: Float[Tensor, "classes d_sae"]
    difference: Differences

    def declared(self, rate: float = RATE) -> list[int]:
        """Those that differ, at a rate of false discoveries, the largest standardised difference first."""
        differ = self.difference.declared(rate)
        return [i for i in self._ranked() if differ[i]]

    def table(self, count: int = 20) -> Table:
        low, high = self.difference.interval()
        q = self.difference.q()
        a, b = self.classes
        rows = tuple(
            (
                i,
                *(float(x) for x in self.mean[:, i]),
                *(float(x) for x in self.frequency[:, i]),
                f"{self.difference.mean[i]:.3f} [{low[i]:.3f}, {high[i]:.3f}]",
                float(q[i]),
            )
            for i in self._ranked()[:count]
        )
        columns = ("latent", f"mean, {a}", f"mean, {b}", f"fires, {a}", f"fires, {b}", f"{a} - {b} [95 %]", "q")
        n = len(self.declared())
        return Table(columns, rows, f"{a} against {b}, {self.difference.n} texts; {n} latents declared at q <= {RATE}")

    def _ranked(self) -> list[int]:
        error = self.difference.error
        size = (self.difference.mean.abs() / error.where(error > 0, torch.ones_like(error))).where(error > 0, 0 * error)
        return [int(i) for i in size.argsort(descending=True, stable=True)]


def latent_contrast(
    model: PreTrainedModel,
    sae: Autoencoder,
    spans: Sequence[Span],
    a: Sequence[Bool[Tensor, " _"]],
    b: Sequence[Bool[Tensor, " _"]],
    *,
    names: tuple[str, str] = ("a", "b"),
) -> LatentContrast:
    """Of every latent, the positions `a` of each text against its positions `b`; a text that lacks one is left out.

    Raises ValueError where fewer than two texts hold both.

    >>> import torch
    >>> from probes import Span, load
    >>> from probes.saes import SparseAutoencoder, latent_contrast
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=64, k=8)
    >>> spans = [Span((1, 6, 17, 7, 27, 5), 0, 6), Span((1, 6, 19, 7, 29, 5), 0, 6)]
    >>> late = [torch.arange(6) > 3] * 2
    >>> latent_contrast(load("organism"), sae, spans, late, [~m for m in late]).difference.n
    2
    """
    classes = [torch.stack([one, other]) for one, other in zip(a, b, strict=True)]
    d_sae = sae.d_sae
    total, active = (torch.zeros(2, d_sae, dtype=torch.float64) for _ in range(2))
    count, difference = torch.zeros(2, dtype=torch.long), Differences.none(d_sae)
    for text in class_moments(model, sae, spans, classes):
        if not bool(text.count.all()):
            continue
        total += text.total.double().cpu()
        active += text.active.double().cpu()
        count += text.count.cpu()
        difference.add(text.mean[0] - text.mean[1])
    if difference.n < 2:
        raise ValueError(f"Only {difference.n} of {len(spans)} texts hold both {names[0]} and {names[1]}: give more.")
    n = count[:, None].clamp(min=1)
    return LatentContrast(names, total / n, active / n, difference)


def phase_contrast(
    model: PreTrainedModel, sae: Autoencoder, completions: Sequence[Completion], a: str = "thinking", b: str = "answer"
) -> LatentContrast:
    """One phase of each completion against another: `prompt`, `thinking`, `answer`. Raises ValueError for another.

    >>> from probes import generate, load
    >>> from probes.saes import SparseAutoencoder, phase_contrast
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=64, k=8)
    >>> written = generate(model, ["a 3 b +4 c *7", "a 5 b *2 c +1"])
    >>> phase_contrast(model, sae, written, "thinking", "prompt").classes
    ('thinking', 'prompt')
    """
    if lost := [phase for phase in (a, b) if phase not in PHASES]:
        raise ValueError(f"{lost[0]!r} is no phase. Known: {', '.join(PHASES)}.")
    spans = [_whole(completion) for completion in completions]
    masks = [Clock.of(model).advance(torch.tensor([span.ids]), None, 0).masks()[:, 0] for span in spans]
    at, other = PHASES.index(a), PHASES.index(b)
    return latent_contrast(model, sae, spans, [m[at] for m in masks], [m[other] for m in masks], names=(a, b))


def segment_contrast(
    model: PreTrainedModel, sae: Autoencoder, segmented: Sequence[tuple[Completion, Sequence[Segment]]], a: str, b: str
) -> LatentContrast:
    """Segments of one label against those of another, in the same completions (`probes.thinking.segments` labels).

    >>> from probes import generate, load
    >>> from probes.saes import SparseAutoencoder, segment_contrast
    >>> from probes.thinking import Segment
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=64, k=8)
    >>> labelled = []
    >>> for c in generate(model, ["a 3 b +4 c *7", "a 5 b *2 c +1"]):
    ...     at = c.span.start
    ...     labelled.append((c, [Segment(at, at + 2, "execution"), Segment(at + 2, at + 4, "reflection")]))
    >>> segment_contrast(model, sae, labelled, "reflection", "execution").classes
    ('reflection', 'execution')
    """
    spans, masks = [], []
    for completion, segments in segmented:
        spans.append(_whole(completion))
        mask = torch.zeros(2, len(completion.all_ids), dtype=torch.bool)
        for segment in segments:
            for row, label in enumerate((a, b)):
                if segment.label == label:
                    mask[row, segment.start : segment.stop] = True
        masks.append(mask)
    return latent_contrast(model, sae, spans, [m[0] for m in masks], [m[1] for m in masks], names=(a, b))


@torch.no_grad()
def prompt_only(model: PreTrainedModel, sae: Autoencoder, ids: Sequence[int]) -> list[int]:
    """The latents that are active at both delimiters of thinking in a prompt, and at none of its other tokens.

    Resa's count of reasoning features (Wang et al. 2025). A delimiter of several tokens, or that occurs more than once,
    counts as one place: a latent has to be active somewhere in it. The first token, an attention sink, is left out.
    Raises ValueError where the prompt lacks a delimiter.

    >>> from probes import load
    >>> from probes.saes import SparseAutoencoder, prompt_only
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=512, k=8)
    >>> len(prompt_only(load("organism"), sae, [1, 6, 17, 5, 3, 56, 4, 21])) < 512
    True
    """
    delimiters, places = delimiters_of(model), []
    for name, wanted in (("opening", delimiters.open), ("closing", delimiters.close)):
        mask = windows(ids, [wanted], (0, 0))
        if not mask.any():
            raise ValueError(f"The prompt lacks the {name} delimiter of thinking, {list(wanted)}.")
        places.append(mask)
    (read,) = streamed(model, [Span(tuple(ids), 0, len(ids))], sae.site, device=sae.decoder.device)
    active = sae.encode(read.x).cpu() > 0
    rest = ~(places[0] | places[1]) & read.used.cpu()
    found = active[places[0]].any(0) & active[places[1]].any(0) & ~active[rest].any(0)
    return [int(i) for i in found.nonzero()[:, 0]]


def _whole(completion: Completion) -> Span:
    return Span(completion.all_ids, 0, len(completion.all_ids))
