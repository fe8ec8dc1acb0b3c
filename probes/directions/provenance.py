"""The birth of a direction: on which model, by which estimator, from which data, read where."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedModel

from probes.fields import from_plain, keys_of
from probes.model.loading import identity_of
from probes.tables import Brief, Table
from probes.thinking.spans import Span

_SINCE_0_2 = {"position": "", "seed": None, "parents": (), "left_out": 0, "sink_share": None}


@dataclass(frozen=True, repr=False)
class Provenance(Brief):
    """On which model a direction was made, by which estimator, from how many spans of which data.

    `data` is a checksum over the spans. `position` says where they were read (a name in `probes.thinking.POSITIONS`),
    empty where it is not known. `seed` is that of the sampling which wrote them, or of what was drawn at random; None
    where there is none, or are several. `parents` are the births of what a direction was computed from. `left_out` is
    how many positions were left out of the means as attention sinks, `sink_share` the mean over spans of the largest
    share of a span's norm that one position holds; None where each span is one position.

    >>> from probes import direction_between, load
    >>> direction = direction_between(load("organism"), ["a 3 quick"], ["a 3"], "L2.resid_post", position="text_last")
    >>> birth = direction.provenance
    >>> birth.estimator, birth.n_positive, birth.n_negative, birth.position, birth.model["name"]
    ('difference in means', 1, 1, 'text_last', 'organism')
    >>> (2 * direction).provenance.parents == (birth,)
    True
    """

    model: dict[str, Any]
    estimator: str
    n_positive: int
    n_negative: int
    data: str
    versions: dict[str, str]
    position: str = ""
    seed: int | None = None
    parents: tuple["Provenance", ...] = field(default=(), metadata={"where": "A parent in {whole}"})
    left_out: int = 0
    sink_share: float | None = None

    @classmethod
    def now(
        cls, model: PreTrainedModel, estimator: str, positive: Sequence[Span], negative: Sequence[Span]
    ) -> "Provenance":
        """The birth of what is made of these spans now, with the versions installed."""
        digest = hashlib.sha256()
        for spans in (positive, negative):
            digest.update(repr(sorted((s.ids, s.start, s.stop) for s in spans)).encode())
        versions = {name: version(name) for name in ("thinksteer", "torch", "transformers")}
        every = [*positive, *negative]
        position = " and ".join(sorted({span.position for span in every if span.position}))
        seeds = {span.seed for span in every}
        seed = seeds.pop() if len(seeds) == 1 else None
        data = digest.hexdigest()[:16]
        return cls(identity_of(model), estimator, len(positive), len(negative), data, versions, position, seed)

    def made(self, estimator: str, *, seed: int | None = None) -> "Provenance":
        """The birth of what was computed from this direction alone."""
        return replace(self, estimator=estimator, seed=self.seed if seed is None else seed, parents=(self,))

    def and_(self, other: "Provenance") -> "Provenance":
        """The birth of the sum of two directions: it keeps both, and counts the spans of both."""
        return replace(
            self,
            estimator=f"({self.estimator}) + ({other.estimator})",
            n_positive=self.n_positive + other.n_positive,
            n_negative=self.n_negative + other.n_negative,
            data=hashlib.sha256(f"{self.data}{other.data}".encode()).hexdigest()[:16],
            position=" and ".join(dict.fromkeys(p for p in (self.position, other.position) if p)),
            seed=self.seed if self.seed == other.seed else None,
            parents=(self, other),
            left_out=self.left_out + other.left_out,
            sink_share=max((s for s in (self.sink_share, other.sink_share) if s is not None), default=None),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON and YAML hold it."""
        return {**asdict(self), "parents": [parent.to_dict() for parent in self.parents]}

    @classmethod
    def from_dict(cls, birth: Mapping[str, Any], where: str) -> "Provenance":
        """Raises ValueError, naming `where`, for keys that are unknown or missing; files of version 0.1 lack some.

        Raises TypeError for a value of another type.
        """
        made = from_plain(cls, {**_SINCE_0_2, **keys_of(birth, where)}, where)
        if lacking := [key for key in ("name", "fingerprint") if not isinstance(made.model.get(key), str)]:
            raise ValueError(f"{where} has a model without {' and '.join(lacking)}, so it is not known whose it is.")
        return made

    def line(self) -> tuple[str, str, str, str, str, str]:
        """Estimator, position, spans, seed, data and model, as a row of words."""
        model = f"{self.model['name']} ({self.model['fingerprint']})"
        spans = f"{self.n_positive}, {self.n_negative}"
        seed = "" if self.seed is None else str(self.seed)
        return self.estimator, self.position, spans, seed, self.data, model


def births_table(births: Iterable[tuple[str, Provenance]]) -> Table:
    """Of each direction, named by where it is used, its birth, and under it those of its parents.

    >>> from probes import direction_between, load
    >>> from probes.directions import births_table
    >>> direction = direction_between(load("organism"), ["a 3 quick"], ["a 3"], "L2.resid_post")
    >>> births_table([("step 1", (2 * direction).provenance)]).to_frame()[["of", "estimator"]]
                     of                estimator
    0            step 1  2 (difference in means)
    1  parent of step 1      difference in means
    """
    rows = tuple(row for where, birth in births for row in _rows(where, birth))
    columns = ("of", "estimator", "position", "n positive, n negative", "seed", "data", "model")
    return Table(columns, rows, "Births of the directions")


def _rows(where: str, birth: Provenance) -> Iterator[tuple[str, ...]]:
    yield where, *birth.line()
    for parent in birth.parents:
        yield from _rows(f"parent of {where}", parent)
