"""The evidence for a direction, layer by layer: what an AUROC stands beside."""

from dataclasses import dataclass

from probes.model.sites import Site
from probes.tables import Shown, Table

Range = tuple[float, float]


@dataclass(frozen=True)
class LayerEvidence:
    """What speaks for the direction of one layer, all measured on the held-out half; ranges are 95 %.

    `auroc` is that of the difference in means of the other half. `null` is where it falls when labels are shuffled,
    `p` its permutation p-value, (1 + #{null >= auroc}) / (1 + n). `random` is where directions drawn from the sphere
    fall. `cosine` is the bootstrap range of the cosine between the two halves' directions. `confounds` are the AUROC of
    what needs no activations; `beyond` is the AUROC of what is left of the projection when they are regressed out of it
    by least squares, fitted on the other half.

    >>> from probes import Site
    >>> from probes.evidence import LayerEvidence
    >>> layer = LayerEvidence(
    ...     Site(2, "resid_mid"), auroc=0.9, null=(0.3, 0.7), p=0.01, random=(0.2, 0.8), cosine=(0.6, 0.8),
    ...     confounds={"span length": 0.95}, beyond=0.5,
    ... )
    >>> layer.confounded  # the length alone separates as well, and nothing is left without it
    True
    """

    site: Site
    auroc: float
    null: Range
    p: float
    random: Range
    cosine: Range
    confounds: dict[str, float]
    beyond: float

    @property
    def confounded(self) -> bool:
        """Does a confound separate as well as the direction (to 0.02), and is nothing left without it (`null`)?"""
        as_well = any(max(a, 1 - a) >= self.auroc - 0.02 for a in self.confounds.values())
        return as_well and self.null[0] <= self.beyond <= self.null[1]


@dataclass(frozen=True, repr=False)
class Evidence(Shown):
    """The evidence of every layer. Layer choice by `best` is a choice: report what it gives on other data.

    >>> from probes import Site
    >>> from probes.evidence import Evidence, LayerEvidence
    >>> rest = {"null": (0.3, 0.7), "p": 0.01, "random": (0.2, 0.8), "cosine": (0.6, 1), "confounds": {}, "beyond": 0.5}
    >>> layers = tuple(LayerEvidence(Site(i, "resid_mid"), auroc, **rest) for i, auroc in enumerate((0.7, 0.9)))
    >>> evidence = Evidence(layers, n_positive=20, n_negative=20)
    >>> str(evidence.best().site)
    'L1.resid_mid'
    >>> evidence.to_frame()[["site", "AUROC"]]
               site  AUROC
    0  L0.resid_mid    0.7
    1  L1.resid_mid    0.9
    """

    layers: tuple[LayerEvidence, ...]
    n_positive: int
    n_negative: int

    def best(self) -> LayerEvidence:
        """The layer of the highest held-out AUROC."""
        return max(self.layers, key=lambda layer: layer.auroc)

    def table(self) -> Table:
        """A row for each layer."""
        names = tuple(self.layers[0].confounds)
        rows = [
            (
                str(e.site), e.auroc, _words(e.null), e.p, _words(e.random), _words(e.cosine),
                *e.confounds.values(), e.beyond, "yes" if e.confounded else "",
            )
            for e in self.layers
        ]  # fmt: skip
        columns = (
            "site",
            "AUROC",
            "shuffled labels",
            "p",
            "random directions",
            "cosine of halves",
            *names,
            "beyond",
            "confounded",
        )
        return Table(columns, tuple(rows), f"{self.n_positive} against {self.n_negative}, half of each held out")


def _words(values: Range) -> str:
    return f"{values[0]:.2f} to {values[1]:.2f}"
