"""A direction in activation space, with where it came from."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._record import record
from probes.directions.provenance import Provenance
from probes.directions.vector import check_number, check_row, number_in
from probes.files import check_keys, reading
from probes.model.architectures import final_norm_of
from probes.model.loading import tokenizer_of
from probes.model.sites import Site
from probes.model.tokens import decode
from probes.tables import Shown, Table
from probes.tensors import read_tensors, write_tensors
from probes.thinking.spans import Span, text_span


@dataclass(frozen=True, eq=False, repr=False)
class Direction(Shown):
    """A vector at a site, in activation units, not normalised. `stream_norm` is the mean norm of what it came from.

    Directions of one site and one model add up and scale, and their births are kept.

    >>> from pathlib import Path
    >>> from probes import Direction, direction_between, load
    >>> model = load("organism")
    >>> direction = direction_between(model, ["a 3 b +4 quick"], ["a 3 b +4"], "L2.resid_post", position="text_last")
    >>> direction, -direction * 2
    (Direction(L2.resid_post, norm 34.3, 1.19 of the stream), Direction(L2.resid_post, norm 68.6, 2.37 of the stream))
    >>> direction.save(Path("quick.safetensors"))
    >>> Direction.load(Path("quick.safetensors")).site
    Site(layer=2, name='resid_post', head=None, expert=None)
    """

    site: Site
    vector: Float[Tensor, " d_model"]
    stream_norm: float
    provenance: Provenance

    def __post_init__(self) -> None:
        check_row(self.vector, f"the direction at {self.site}")
        check_number(self.stream_norm, "stream_norm", f"The direction at {self.site}")
        if self.stream_norm < 0:
            raise ValueError(f"The direction at {self.site} has stream_norm {self.stream_norm}: a norm is 0 or more.")

    @property
    def norm(self) -> float:
        """The length of the vector, in activation units."""
        return float(self.vector.norm())

    @property
    def unit(self) -> Float[Tensor, " d_model"]:
        """The vector at length 1. Raises ValueError where it is zero."""
        if self.norm == 0:
            raise ValueError(f"The direction at {self.site} is zero: both classes have the same mean.")
        out: Tensor = self.vector / self.vector.norm()
        return out

    def __add__(self, other: "Direction") -> "Direction":
        """The sum of two directions at one site of one model. Raises ValueError where they are not."""
        p, q = self.provenance, other.provenance
        if self.site != other.site:
            raise ValueError(f"Directions at {self.site} and {other.site} do not add up: derive both at one site.")
        if p.model["fingerprint"] != q.model["fingerprint"]:
            raise ValueError(f"Directions of {p.model['name']!r} and {q.model['name']!r} do not add up: two models.")
        norm = (self.stream_norm + other.stream_norm) / 2
        return Direction(self.site, self.vector + other.vector, norm, p.and_(q))

    def __mul__(self, strength: float) -> "Direction":
        """The direction `strength` times as long."""
        provenance = self.provenance.made(f"{strength:g} ({self.provenance.estimator})")
        return replace(self, vector=strength * self.vector, provenance=provenance)

    def __neg__(self) -> "Direction":
        return self * -1.0

    def __sub__(self, other: "Direction") -> "Direction":
        return self + -other

    __rmul__ = __mul__

    def tokens(self, model: PreTrainedModel, k: int = 10) -> Table:
        """The vocabulary that the direction raises and lowers most, read through final norm and unembedding."""
        rows = tokens_along(model, self.unit, k)
        return Table(("raises", "by", "lowers", "by "), rows, f"{self.site}, per unit of the direction")

    def save(self, path: Path) -> None:
        """One safetensors file, with site and birth in its header."""
        words = {
            "kind": "direction",
            "site": str(self.site),
            "stream_norm": self.stream_norm,
            "provenance": self.provenance.to_dict(),
        }
        write_tensors(path, {"vector": self.vector}, words)

    @classmethod
    def load(cls, path: Path) -> "Direction":
        """Read what `save` wrote. Raises ValueError where the file is truncated, or its keys are not ours."""
        with reading(path, "direction"):
            tensors, words = read_tensors(path)
            check_keys(words, ("kind", "site", "stream_norm", "provenance"), f"{path}")
            check_keys(tensors, ("vector",), f"{path}")
            provenance = Provenance.from_dict(words["provenance"], f"The provenance in {path}")
            norm = number_in(words, "stream_norm", f"{path}")
            return cls(Site.parse(words["site"]), tensors["vector"], norm, provenance)

    @property
    def _of_stream(self) -> float:
        return self.norm / self.stream_norm if self.stream_norm else nan

    def table(self) -> Table:
        """What it is, and its birth."""
        estimator, position, spans, seed, data, model = self.provenance.line()
        share = self.provenance.sink_share
        rows = (
            ("site", str(self.site)),
            ("norm", self.norm),
            ("norm / stream norm", self._of_stream),
            ("estimator", estimator),
            ("position", position),
            ("n positive, n negative", spans),
            ("seed", seed),
            ("sinks left out", self.provenance.left_out),
            ("one position's share", "" if share is None else share),
            ("model", model),
            ("data", data),
            *((f"parent {i + 1}", ", ".join(p.line())) for i, p in enumerate(self.provenance.parents)),
        )
        return Table(("Direction", ""), rows)

    def __repr__(self) -> str:
        return f"Direction({self.site}, norm {self.norm:.3g}, {self._of_stream:.2f} of the stream)"


@torch.no_grad()
def tokens_along(
    model: PreTrainedModel, unit: Float[Tensor, " d_model"], k: int
) -> tuple[tuple[str, float, str, float], ...]:
    """The k tokens that a vector raises and lowers most, and by how much, through final norm and unembedding."""
    unembedding, tokenizer = model.get_output_embeddings().get_parameter("weight"), tokenizer_of(model)
    logits = unembedding.float() @ final_norm_of(model, unit).to(unembedding.device)
    up, down = logits.topk(k), logits.topk(k, largest=False)
    return tuple(
        (decode(tokenizer, [int(u)]), float(x), decode(tokenizer, [int(d)]), float(y))
        for u, x, d, y in zip(up.indices, up.values, down.indices, down.values, strict=True)
    )


def difference_in_means(
    model: PreTrainedModel,
    positive: Sequence[Span],
    negative: Sequence[Span],
    sites: Sequence[Site],
    *,
    keep_sinks: bool = False,
) -> dict[Site, Direction]:
    """v = mean over positive - mean over negative, of each span's mean activation (a span counts once).

    The estimator of *(Marks and Tegmark 2023)*. Attention sinks are left out of the means and of the stream's norm,
    unless `keep_sinks` (see `probes.activations.span_means`); a warning says so where they are kept and one position
    holds half the norm. Raises ValueError where a class is empty.

    >>> from probes import Site, difference_in_means, load
    >>> from probes.thinking import text_span
    >>> model, sites = load("organism"), [Site(1, "resid_post"), Site(2, "resid_post")]
    >>> quick = [text_span(model, text) for text in ("a 3 b +4 quick", "a 5 quick")]
    >>> plain = [text_span(model, text) for text in ("a 3 b +4", "a 5")]
    >>> list(difference_in_means(model, quick, plain, sites).values())
    [Direction(L1.resid_post, norm 16.2, 0.45 of the stream), Direction(L2.resid_post, norm 23.6, 0.49 of the stream)]
    """
    if not positive or not negative:
        raise ValueError(
            f"A direction needs both classes, but got {len(positive)} positive and {len(negative)} negative."
        )
    above = record(model, positive, sites, keep_sinks=keep_sinks, label="reading positive")
    below = record(model, negative, sites, keep_sinks=keep_sinks, label="reading negative")
    birth = Provenance.now(model, "difference in means", positive, negative)
    made = {}
    for site in sites:
        both = above[site] + below[site]
        share = float(both.share.mean) if both.share.count else None
        if keep_sinks and share is not None and share > 0.5:
            warnings.warn(
                f"One position holds {share:.0%} of a text's norm at {site}: an attention sink, and the direction is "
                "mostly its. Without keep_sinks such positions are left out.",
                stacklevel=2,
            )
        vector = (above[site].activation.mean - below[site].activation.mean).float().cpu()
        provenance = replace(birth, left_out=both.left_out, sink_share=share)
        made[site] = Direction(site, vector, float(both.norm.mean), provenance)
    return made


def direction_between(
    model: PreTrainedModel,
    texts_a: Sequence[str],
    texts_b: Sequence[str],
    site: Site | str,
    *,
    position: str = "text",
    keep_sinks: bool = False,
) -> Direction:
    """The direction from texts b to texts a at a site: any contrast, of plain texts.

    Each text is read at the mean of its tokens (`text`) or at its last one (`text_last`). Attention sinks, the first
    token among them, are left out of a mean, unless `keep_sinks` (see `probes.activations.span_means`). Raises
    ValueError where a class is empty, or the position is none of a text.

    >>> from probes import direction_between, load
    >>> direction_between(load("organism"), ["a 3 quick"], ["a 3"], "L2.resid_post", position="text_last")
    Direction(L2.resid_post, norm 90.5, 1.61 of the stream)
    """
    where = Site.parse(site) if isinstance(site, str) else site
    a, b = ([text_span(model, text, position=position) for text in texts] for texts in (texts_a, texts_b))
    return difference_in_means(model, a, b, [where], keep_sinks=keep_sinks)[where]


def random_direction(direction: Direction, *, seed: int) -> Direction:
    """The control: a direction of the same norm, drawn uniformly from the sphere.

    >>> from probes import direction_between, load
    >>> from probes.directions import random_direction
    >>> direction = direction_between(load("organism"), ["a 3 quick"], ["a 3"], "L2.resid_post")
    >>> null = random_direction(direction, seed=0)
    >>> f"{null.norm / direction.norm:.3f}", f"{float(null.unit @ direction.unit):.2f}"
    ('1.000', '-0.06')
    """
    noise = torch.randn(direction.vector.shape, generator=torch.Generator().manual_seed(seed))
    vector = noise / noise.norm() * direction.norm
    birth = direction.provenance
    birth = birth.made(f"random direction of the norm of ({birth.estimator})", seed=seed)
    return replace(direction, vector=vector, provenance=birth)
