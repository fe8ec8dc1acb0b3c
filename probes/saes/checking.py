"""Is an autoencoder what its label says? Asked of the model: how much it explains there, and next door."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from probes.model.architectures import has_site, n_layers, width_of
from probes.model.loading import origin_of, tokenizer_of
from probes.model.sites import SITE_NAMES, Site
from probes.saes.reading import CHUNK_BYTES, streamed
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
    fit = Fit(tuple(explained(model, one, spans) for one in _candidates(model, sae)))
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
def explained(model: PreTrainedModel, sae: SparseAutoencoder, spans: Sequence[Span]) -> Explained:
    """What it explains of these spans, text by text and chunk by chunk."""
    step = max(1, CHUNK_BYTES // (4 * sae.d_sae))
    n, lost, square, active = 0, 0.0, 0.0, 0.0
    total = alive = torch.zeros(())
    for x, y in _pairs(model, sae.site, sae.out_site, spans, sae.decoder.device):
        for start in range(0, len(x), step):
            x_part, y_part = x[start : start + step], y[start : start + step]
            f = sae.encode(x_part)
            lost += float((sae.decode(f, x_part) - y_part).double().square().sum())
            square += float(y_part.double().square().sum())
            total = total + y_part.double().sum(0)
            active += float((f > 0).sum())
            alive = (alive > 0) | (f > 0).any(0)
            n += len(x_part)
    spread = square - float(total.square().sum()) / max(n, 1)
    share = float(alive.float().mean()) if alive.ndim else 0.0
    return Explained(sae.site, sae.out_site, 1 - lost / spread if spread else 0.0, active / max(n, 1), share, n)


def _pairs(
    model: PreTrainedModel, site: Site, out_site: Site, spans: Sequence[Span], device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each text what is read and what is reconstructed, at the positions that are used at both."""
    reads = streamed(model, spans, site, device=device, label=f"reading {site}")
    if out_site == site:
        yield from ((read.x[read.used], read.x[read.used]) for read in reads)
        return
    written = streamed(model, spans, out_site, device=device, label=f"reading {out_site}")
    for read, wrote in zip(reads, written, strict=True):
        used = read.used & wrote.used
        yield read.x[used], wrote.x[used]


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
