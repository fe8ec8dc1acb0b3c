"""A direction in activation space, with where it came from."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._record import record
from probes.files import check_keys, read_tensors, write_tensors
from probes.model.architectures import final_norm_of
from probes.model.loading import identity_of, tokenizer_of
from probes.model.sites import Site
from probes.model.tokens import decode
from probes.tables import Table
from probes.thinking.spans import Span, text_span


@dataclass(frozen=True)
class Provenance:
    """The birth of a direction: on which model, by which estimator, from which data."""

    model: dict[str, Any]
    estimator: str
    n_positive: int
    n_negative: int
    data: str
    versions: dict[str, str]

    @classmethod
    def now(
        cls, model: PreTrainedModel, estimator: str, positive: Sequence[Span], negative: Sequence[Span]
    ) -> "Provenance":
        digest = hashlib.sha256()
        for spans in (positive, negative):
            digest.update(repr(sorted((s.ids, s.start, s.stop) for s in spans)).encode())
        versions = {name: version(name) for name in ("thinksteer", "torch", "transformers")}
        return cls(identity_of(model), estimator, len(positive), len(negative), digest.hexdigest()[:16], versions)


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector at a site, in activation units, not normalised. `stream_norm` is the mean norm of what it came from."""

    site: Site
    vector: Float[Tensor, " d_model"]
    stream_norm: float
    provenance: Provenance

    @property
    def norm(self) -> float:
        return float(self.vector.norm())

    @property
    def unit(self) -> Float[Tensor, " d_model"]:
        if self.norm == 0:
            raise ValueError(f"The direction at {self.site} is zero: both classes have the same mean.")
        return self.vector / self.vector.norm()

    def __add__(self, other: "Direction") -> "Direction":
        """The sum of two directions at one site of one model. Raises ValueError where they are not."""
        p, q = self.provenance, other.provenance
        if self.site != other.site:
            raise ValueError(f"Directions at {self.site} and {other.site} do not add up: derive both at one site.")
        if p.model["fingerprint"] != q.model["fingerprint"]:
            raise ValueError(f"Directions of {p.model['name']!r} and {q.model['name']!r} do not add up: two models.")
        data = hashlib.sha256(f"{p.data}{q.data}".encode()).hexdigest()[:16]
        whole = replace(p, estimator=f"({p.estimator}) + ({q.estimator})", data=data)
        norm = (self.stream_norm + other.stream_norm) / 2
        return Direction(self.site, self.vector + other.vector, norm, whole)

    def __mul__(self, strength: float) -> "Direction":
        provenance = replace(self.provenance, estimator=f"{strength:g} ({self.provenance.estimator})")
        return replace(self, vector=strength * self.vector, provenance=provenance)

    def __neg__(self) -> "Direction":
        return self * -1.0

    def __sub__(self, other: "Direction") -> "Direction":
        return self + -other

    __rmul__ = __mul__

    @torch.no_grad()
    def tokens(self, model: PreTrainedModel, k: int = 10) -> Table:
        """The vocabulary that the direction raises and lowers most, read through final norm and unembedding."""
        unembedding = model.get_output_embeddings().get_parameter("weight")
        logits = unembedding.float() @ final_norm_of(model, self.unit).to(unembedding.device)
        up, down = logits.topk(k), logits.topk(k, largest=False)
        tokenizer = tokenizer_of(model)
        rows = [
            (decode(tokenizer, [int(u)]), float(x), decode(tokenizer, [int(d)]), float(y))
            for u, x, d, y in zip(up.indices, up.values, down.indices, down.values, strict=True)
        ]
        return Table(("raises", "by", "lowers", "by "), tuple(rows), f"{self.site}, per unit of the direction")

    def save(self, path: Path) -> None:
        words = {
            "kind": "direction",
            "site": str(self.site),
            "stream_norm": self.stream_norm,
            "provenance": asdict(self.provenance),
        }
        write_tensors(path, {"vector": self.vector}, words)

    @classmethod
    def load(cls, path: Path) -> "Direction":
        tensors, words = read_tensors(path)
        check_keys(words, ("kind", "site", "stream_norm", "provenance"), f"{path}")
        check_keys(tensors, ("vector",), f"{path}")
        check_keys(words["provenance"], (field.name for field in fields(Provenance)), f"The provenance in {path}")
        provenance = Provenance(**words["provenance"])
        return cls(Site.parse(words["site"]), tensors["vector"], words["stream_norm"], provenance)

    def summary(self) -> Table:
        p = self.provenance
        rows = (
            ("site", str(self.site)),
            ("norm", self.norm),
            ("norm / stream norm", self.norm / self.stream_norm),
            ("estimator", p.estimator),
            ("n positive, n negative", f"{p.n_positive}, {p.n_negative}"),
            ("model", f"{p.model['name']} ({p.model['fingerprint']})"),
            ("data", p.data),
        )
        return Table(("Direction", ""), rows)

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def __repr__(self) -> str:
        return f"Direction({self.site}, norm {self.norm:.3g}, {self.norm / self.stream_norm:.2f} of the stream)"


def difference_in_means(
    model: PreTrainedModel, positive: Sequence[Span], negative: Sequence[Span], sites: Sequence[Site]
) -> dict[Site, Direction]:
    """v = mean over positive - mean over negative, of each span's mean activation (a span counts once)."""
    if not positive or not negative:
        raise ValueError(
            f"A direction needs both classes, but got {len(positive)} positive and {len(negative)} negative."
        )
    above = record(model, positive, sites, label="reading positive")
    below = record(model, negative, sites, label="reading negative")
    provenance = Provenance.now(model, "difference in means", positive, negative)
    return {
        site: Direction(
            site,
            (above[site].activation.mean - below[site].activation.mean).float().cpu(),
            float((above[site].norm + below[site].norm).mean),
            provenance,
        )
        for site in sites
    }


def direction_between(
    model: PreTrainedModel,
    texts_a: Sequence[str],
    texts_b: Sequence[str],
    site: Site | str,
    *,
    position: Literal["mean", "last"] = "mean",
) -> Direction:
    """The direction from texts b to texts a at a site: any contrast, of plain texts.

    Each text is read at the mean of its tokens or at its last one. Raises ValueError where a class is empty.
    """
    where = Site.parse(site) if isinstance(site, str) else site
    a, b = ([text_span(model, text, last=position == "last") for text in texts] for texts in (texts_a, texts_b))
    return difference_in_means(model, a, b, [where])[where]


def random_direction(direction: Direction, *, seed: int) -> Direction:
    """The control: a direction of the same norm, drawn uniformly from the sphere."""
    noise = torch.randn(direction.vector.shape, generator=torch.Generator().manual_seed(seed))
    vector = noise / noise.norm() * direction.norm
    return Direction(direction.site, vector, direction.stream_norm, direction.provenance)
