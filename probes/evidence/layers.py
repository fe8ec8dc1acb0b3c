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

    >>> from probes import load
    >>> from probes.evidence import evidence_for
    >>> from probes.thinking import text_span
    >>> model = load("organism")
    >>> positive, negative = (
    ...     [text_span(model, f"a {k} b +{j} {word} ?") for k in range(5) for j in range(1, 6)]
    ...     for word in ("quick", "")
    ... )
    >>> found = evidence_for(model, positive, negative)
    >>> [round(layer.auroc, 3) for layer in found.layers]
    [0.811, 0.822, 0.911, 0.84]
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

    >>> from probes import load
    >>> from probes.evidence import evidence_for
    >>> from probes.thinking import text_span
    >>> model = load("organism")
    >>> positive, negative = (
    ...     [text_span(model, f"a {k} b +{j} {word} ?") for k in range(5) for j in range(1, 6)]
    ...     for word in ("quick", "")
    ... )
    >>> found = evidence_for(model, positive, negative)
    >>> [round(layer.auroc, 3) for layer in found.layers]
    [0.811, 0.822, 0.911, 0.84]
    """

    layers: tuple[LayerEvidence, ...]
    n_positive: int
    n_negative: int

    def best(self) -> LayerEvidence:
        return max(self.layers, key=lambda layer: layer.auroc)

    def table(self) -> Table:
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
