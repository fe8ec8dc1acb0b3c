"""Is an autoencoder what its label says? Asked of the model: how much it explains there, and next door."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from probes.model.architectures import has_site, n_layers, width_of
from probes.model.loading import origin_of, tokenizer_of
from probes.model.sites import SITE_NAMES, Site
from probes.saes.reading import CHUNK_BYTES, streamed_at
from probes.saes.sae import SparseAutoencoder
from probes.tables import Shown, Table
from probes.thinking.spans import Span

MARGIN = 0.02
"""A neighbour wins where it is explained better by more than this."""


@dataclass(frozen=True)
class Explained:
    """What an autoencoder explains of the activations at a pair of sites, attention sinks left out.

    `variance`: 1 - sum ‖x - x̂‖² / sum ‖x - mean‖²; `l0`: active latents a token; `alive`: the share of
    latents that were active at all.

    >>> from probes import Site
    >>> from probes.saes import Explained
    >>> Explained(Site(2, "resid_post"), Site(2, "resid_post"), variance=0.9, l0=8.0, alive=1.0, tokens=100).variance
    0.9
    """

    site: Site
    out_site: Site
    variance: float
    l0: float
    alive: float
    tokens: int


@dataclass(frozen=True, repr=False)
class Fit(Shown):
    """What an autoencoder explains where its label puts it, first, and at the neighbours.

    >>> from probes import load
    >>> from probes.saes import SparseAutoencoder, check_sae
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=512, k=96)
    >>> fit = check_sae(load("organism"), sae, ["a 3 b +4 c *7"], force=True)
    >>> str(fit.declared.site), len(fit.rows)
    ('L2.resid_post', 9)
    """

    rows: tuple[Explained, ...]

    @property
    def declared(self) -> Explained:
        return self.rows[0]

    @property
    def best(self) -> Explained:
        return max(self.rows, key=lambda row: row.variance)

    def table(self) -> Table:
        rows = tuple(
            (f"{r.site} to {r.out_site}" if r.site != r.out_site else str(r.site), r.variance, r.l0, r.alive)
            for r in self.rows
        )
        title = f"Explained over {self.declared.tokens:,} tokens; the first is what the label says"
        return Table(("site", "explained variance", "L0", "alive"), rows, title)


def check_sae(
    model: PreTrainedModel,
    sae: SparseAutoencoder,
    texts: Sequence[str] | Sequence[Span],
    *,
    force: bool = False,
) -> Fit:
    """How much of the variance it explains at its site and at the neighbours: a layer before and after, and
    the other places of its block that are as wide.

    Raises ValueError, naming what was found, where it explains nothing, where a neighbour is explained better by more
    than `MARGIN`, or where it says that it was trained on another model; with `force` it only tells.

    >>> from probes import load
    >>> from probes.saes import SparseAutoencoder, check_sae
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=512, k=96)
    >>> check_sae(load("organism"), sae, ["a 3 b +4 c *7"], force=True).declared.l0
    96.0
    """
    if not texts:
        raise ValueError("A check needs texts that the model reads as it was meant to: give a few.")
    if not force:
        _same_model(model, sae)
    tokenizer = tokenizer_of(model)
    rows = [tuple(tokenizer.encode(text)) if isinstance(text, str) else text for text in texts]
    spans = [row if isinstance(row, Span) else Span(row, 0, len(row)) for row in rows]
    fit = Fit(_explained(model, list(_candidates(model, sae)), spans))
    if force:
        return fit
    if fit.declared.variance <= 0:
        raise ValueError(
            f"{sae!r} explains nothing of the activations there: {fit.declared.variance:.2f} of their variance. The "
            f"best of its neighbours is {fit.best.site}, {fit.best.variance:.2f}. Is it of another model, site or "
            "scale, or stored the other way round? With force=True it is used all the same."
        )
    if fit.best.variance > fit.declared.variance + MARGIN:
        raise ValueError(
            f"{sae!r} explains {fit.declared.variance:.2f} of the variance at {fit.declared.site}, where its label "
            f"puts it, and {fit.best.variance:.2f} at {fit.best.site}: the label is wrong. Load it with "
            f"site={str(fit.best.site)!r}, or give force=True."
        )
    return fit


@torch.no_grad()
def _explained(
    model: PreTrainedModel, saes: Sequence[SparseAutoencoder], spans: Sequence[Span]
) -> tuple[Explained, ...]:
    """What each explains of these spans, all in one pass, text by text and chunk by chunk."""
    sums = [_Sums() for _ in saes]
    sites = list(dict.fromkeys(site for sae in saes for site in (sae.site, sae.out_site)))
    for reads in streamed_at(model, spans, sites, device=saes[0].decoder.device):
        for one, sae in zip(sums, saes, strict=True):
            read, wrote = reads[sae.site], reads[sae.out_site]
            used = read.used & wrote.used
            one.add(sae, read.x[used], wrote.x[used])
    return tuple(one.told(sae) for one, sae in zip(sums, saes, strict=True))


@dataclass
class _Sums:
    """Over tokens: what one autoencoder leaves unexplained, of what, and by how many latents."""

    tokens: int = 0
    lost: float = 0.0
    square: float = 0.0
    active: float = 0.0
    total: Tensor | float = 0.0
    alive: Tensor | None = None

    def add(self, sae: SparseAutoencoder, x: Tensor, y: Tensor) -> None:
        """The tokens of one text: what it reads, and what it is to reconstruct."""
        step = max(1, CHUNK_BYTES // (4 * sae.d_sae))
        for x_part, y_part in zip(x.split(step), y.split(step), strict=True):
            f, wide = sae.encode(x_part), y_part.double()
            self.lost += float((sae.decode(f, x_part) - y_part).double().square().sum())
            self.square += float(wide.square().sum())
            self.total = self.total + wide.sum(0)
            self.active += float((f > 0).sum())
            alive = (f > 0).any(0)
            self.alive = alive if self.alive is None else self.alive | alive
            self.tokens += len(x_part)

    def told(self, sae: SparseAutoencoder) -> Explained:
        n = max(self.tokens, 1)
        spread = self.square - float(torch.as_tensor(self.total).square().sum()) / n
        share = 0.0 if self.alive is None else float(self.alive.float().mean())
        variance = 1 - self.lost / spread if spread else 0.0
        return Explained(sae.site, sae.out_site, variance, self.active / n, share, self.tokens)


def _candidates(model: PreTrainedModel, sae: SparseAutoencoder) -> Iterator[SparseAutoencoder]:
    """As its label says, and then at the neighbours."""
    yield sae
    site, out = sae.site, sae.out_site
    shifts = [shift for shift in (-1, 1) if 0 <= min(site.layer, out.layer) + shift < n_layers(model)]
    for shift in shifts:
        moved, moved_out = (replace(one, layer=one.layer + shift) for one in (site, out))
        if _fits(model, moved, sae.d_in) and _fits(model, moved_out, sae.W_dec.shape[1]):
            yield replace(sae, site=moved, output=None if out == site else moved_out)
    for name in SITE_NAMES:
        if name in (site.name, "routing", "result", "z"):
            continue
        other = Site(site.layer, name)
        if _fits(model, other, sae.d_in) and (out == site or other != out):
            yield replace(sae, site=other, output=None if out == site else out)


def _fits(model: PreTrainedModel, site: Site, width: int) -> bool:
    return (
        0 <= site.layer < n_layers(model) and has_site(model, site.layer, site.name) and width_of(model, site) == width
    )


def _same_model(model: PreTrainedModel, sae: SparseAutoencoder) -> None:
    said = "" if sae.birth is None else sae.birth.model
    own = {str(origin_of(model).name), str(getattr(model.config, "_name_or_path", ""))}
    if said and _plain(said) not in {_plain(name) for name in own}:
        raise ValueError(
            f"{sae!r} says that it was trained on {said}, and this model is {origin_of(model).name}. Load that one, or "
            "give force=True where the label is known to be wrong."
        )


def _plain(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
