"""Which parts work together: what two do at once, beyond what each does alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from probes.figures.causal import interactions_figure
from probes.late import go
from probes.lens.inputs import Source
from probes.tables import Shown, Table
from probes.words import checked
from steer.causal.knocking import Knock, effects, key_of
from steer.causal.metrics import Metric
from steer.causal.parts import Part, named_parts
from steer.causal.significance import Estimates, estimates

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False, repr=False)
class Interactions(Shown):
    """effect(both) - effect(a) - effect(b) of each of `pairs`, indices into `names`, prompt by prompt, in units of the
    metric; `single` are the parts' own effects. 0 where each does what it does whether the other is there or not.

    >>> from probes import load
    >>> from steer.causal import interactions, logit_difference
    >>> heads, metric = ["L0H0.z", "L0H2.z", "L3H6.z"], logit_difference(3, 56)
    >>> found = interactions(load("organism"), ["a 3 b +4", "a 5 b -2"], heads, metric=metric)
    >>> found.pairs, found.interaction.shape
    (((0, 1), (0, 2), (1, 2)), (2, 3))
    """

    names: tuple[str, ...]
    pairs: tuple[Pair, ...]
    single: Float[np.ndarray, "prompts parts"]
    interaction: Float[np.ndarray, "prompts pairs"]
    estimates: Estimates

    def found(self, level: float = 0.05, *, least: float = 0.0) -> list[tuple[str, str]]:
        """The pairs whose interaction is other than 0, and of a size of `least` or more, the largest first; a share of
        about `level` of them is false."""
        order = sorted(self._found(level, least), key=lambda i: -abs(self.estimates.mean[i]))
        return [(self.names[a], self.names[b]) for a, b in (self.pairs[i] for i in order)]

    def matrix(self) -> Float[np.ndarray, "parts parts"]:
        """The mean interaction of each pair; NaN on the diagonal."""
        out = np.full((len(self.names), len(self.names)), np.nan)
        for (a, b), mean in zip(self.pairs, self.estimates.mean, strict=True):
            out[a, b] = out[b, a] = mean
        return out

    def table(self, k: int = 10) -> Table:
        """The k pairs of the largest interaction, with what each part does alone."""
        e, alone = self.estimates, self.single.mean(0)
        rows = [
            (f"{self.names[a]} with {self.names[b]}", float(e.mean[i]), e.interval(i),
             float(e.q[i]), float(alone[a]), float(alone[b]))
            for i in np.argsort(-np.abs(e.mean), kind="stable")[:k]
            for a, b in [self.pairs[i]]
        ]  # fmt: skip
        columns = ("pair", "interaction", "95 %", "q", "the first alone", "the second")
        return Table(columns, tuple(rows), f"{len(self.single)} prompts, {len(self.pairs)} pairs")

    def figure(self, level: float = 0.05, *, least: float = 0.0) -> "go.Figure":
        """The map of all pairs; those that are found are outlined."""
        found = [self.pairs[i] for i in self._found(level, least)]
        return interactions_figure(self.matrix(), self.names, found=found)

    def _found(self, level: float, least: float) -> list[int]:
        return [int(i) for i in np.flatnonzero(self.estimates.told(level, least))]


@checked
def interactions(
    model: PreTrainedModel,
    prompts: Sequence[Source],
    parts: Sequence[Part] | Mapping[str, Part],
    *,
    metric: Metric | Sequence[Metric],
    kind: Knock = "zero",
    reference: Sequence[Source] = (),
    seed: int = 0,
    batch_size: int = 64,
) -> Interactions:
    """Change all parts, and all pairs of them, over prompts: effect(both) - effect(a) - effect(b), the interaction of a
    two-by-two design (Fisher 1935).

    Parts, kinds of knock-out and errors are those of `ablated`; an intervention, such as an Add, is a part too, and of
    two at one site the first acts first. Raises ValueError where there are fewer than two parts.

    >>> from probes import Site, load
    >>> from steer.causal import interactions, logit_difference
    >>> model = load("organism")
    >>> ids = [[1, 6, 17, 7, 27, 5, 3, 56, 6, 48, 7, 27], [1, 6, 18, 7, 26, 5, 3, 56, 6, 49, 7, 26]]
    >>> heads = [Site(0, "z", head) for head in range(4)]
    >>> found = interactions(model, ids, heads, metric=logit_difference(52, against=54))
    >>> found.matrix().shape, len(found.pairs)
    ((4, 4), 6)
    """
    known = named_parts(model, parts)
    if len(known) < 2:
        raise ValueError("Parts interact in pairs, but one part was given.")
    members, pairs = list(known.values()), tuple(combinations(range(len(known)), 2))
    both = [members[a] + members[b] for a, b in pairs]
    _, found = effects(model, prompts, [*members, *both], metric=metric, kind=kind, reference=reference, seed=seed,
                       batch_size=batch_size)  # fmt: skip
    single = np.stack([found[key_of(one)] for one in members], axis=1)
    joint = np.stack([found[key_of(pair)] for pair in both], axis=1)
    beyond = joint - np.stack([single[:, a] + single[:, b] for a, b in pairs], axis=1)
    return Interactions(tuple(known), pairs, single, beyond, estimates(beyond))
