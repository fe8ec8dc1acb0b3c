"""What is lost without a part: knock-outs over prompts, against as many others drawn at random."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from probes.lens.inputs import Source
from probes.model.sites import Site
from probes.tables import Shown, Table
from probes.words import checked
from steer.causal.knocking import Knock, effects, key_of
from steer.causal.metrics import Metric
from steer.causal.parts import Member, Members, Part, named_parts, others_like
from steer.causal.significance import Estimates, estimates


@dataclass(frozen=True, eq=False, repr=False)
class Ablations(Shown):
    """How much each knock-out adds to the metric (below 0, the part serves it), prompt by prompt, and `random`, the
    mean size of what as many other parts of its kind, drawn at random, add or take; NaN where there is none. `own` are
    the estimates of `effect`, `beyond` those of its size less `random`, in units of the metric.

    >>> from probes import load
    >>> from steer.causal import ablated, logit_difference
    >>> found = ablated(load("organism"), ["a 3 b +4", "a 5 b -2"], ["L0H2.z"], metric=logit_difference(3, 56))
    >>> found.effect.shape, found.names
    ((2, 1), ('L0H2.z',))
    """

    names: tuple[str, ...]
    plain: Float[np.ndarray, " prompts"]
    effect: Float[np.ndarray, "prompts parts"]
    random: Float[np.ndarray, "prompts parts"]
    own: Estimates
    beyond: Estimates

    def found(self, level: float = 0.05, *, least: float = 0.0) -> list[str]:
        """The parts whose effect is other than 0, of a size of `least` or more, and larger than that of random ones if
        there are any; a share of about `level` of them is false."""
        larger = np.isnan(self.beyond.q) | ((self.beyond.q <= level) & (self.beyond.mean > 0))
        real = self.own.told(level, least) & larger
        return [name for name, yes in zip(self.names, real, strict=True) if yes]

    def table(self, k: int = 10) -> Table:
        """The k parts of the largest effect."""
        own, beyond = self.own, self.beyond
        rows = [
            (self.names[i], own.mean[i], own.interval(i), own.q[i],
             self.random[:, i].mean(), beyond.interval(i), beyond.q[i])
            for i in np.argsort(-np.abs(own.mean), kind="stable")[:k]
        ]  # fmt: skip
        columns = ("part", "effect", "95 %", "q", "size of random", "size beyond, 95 %", "its q")
        return Table(columns, tuple(tuple(map(_plain, row)) for row in rows), f"{len(self.plain)} prompts")


@checked
def ablated(
    model: PreTrainedModel,
    prompts: Sequence[Source],
    parts: Sequence[Part] | Mapping[str, Part],
    *,
    metric: Metric | Sequence[Metric],
    kind: Knock = "zero",
    reference: Sequence[Source] = (),
    controls: int = 10,
    seed: int = 0,
    batch_size: int = 64,
) -> Ablations:
    """The effect of knocking each part out, over prompts: a head, an expert, a site, an intervention, or several at
    once, which are a tuple.

    `zero` takes away what it holds, `mean` sets the mean over `reference`, sinks left out, `resample` what it held for
    another of them that is as long *(Chan et al. 2022, Causal Scrubbing)*; the prompts themselves where no reference is
    given. The null is `controls` draws of as many other heads (experts, layers): a draw that shares a part with the one
    looked at does not count. Runs of all parts and prompts share batches. Raises ValueError where a part is not there,
    is named twice, or cannot be replaced so.

    >>> from probes import load
    >>> from probes.model import tokenizer_of
    >>> from steer.causal import ablated, logit_difference
    >>> model = load("organism")
    >>> encode = tokenizer_of(model).encode
    >>> prompts = [encode(f"<bos> a {x} b +4 ? <think> Okay a ={x} b +4") for x in range(6)]  # next is x + 4: 45 is =0
    >>> metric = [logit_difference(45 + (x + 4) % 10, against=45 + (x + 6) % 10) for x in range(6)]
    >>> heads = [f"L0H{head}.z" for head in range(8)]
    >>> found = ablated(model, prompts, heads, metric=metric, kind="resample")
    >>> found.names[found.own.mean.argmin()], round(float(found.own.mean.min()), 1)
    ('L0H5.z', -7.8)
    """
    known = named_parts(model, parts)
    drawn = _Controls(model, controls, seed)
    nulls = [drawn.like(members) for members in known.values()]
    groups = [*known.values(), *(null for others in nulls for null in others)]
    plain, found = effects(model, prompts, groups, metric=metric, kind=kind, reference=reference, seed=seed,
                           batch_size=batch_size)  # fmt: skip
    own = np.stack([found[key_of(members)] for members in known.values()], axis=1)
    none = np.full(len(plain), np.nan)
    random = np.stack(
        [np.mean([np.abs(found[key_of(null)]) for null in others], axis=0) if others else none for others in nulls],
        axis=1,
    )
    return Ablations(tuple(known), plain, own, random, estimates(own), estimates(np.abs(own) - random))


class _Controls:
    """Draws of parts at random, the same for all parts of one kind and number."""

    def __init__(self, model: PreTrainedModel, count: int, seed: int) -> None:
        self.model, self.count, self.seed = model, count, seed
        self._known: dict[tuple[str, ...], list[Members]] = {}

    def like(self, members: Members) -> list[Members]:
        """As many others of the kind, `count` times; fewer where there are fewer, none for an intervention."""
        sites = [member for member in members if isinstance(member, Site)]
        if len(sites) < len(members):
            return []
        kinds = tuple(sorted(_kind(site) for site in sites))
        if kinds not in self._known:
            self._known[kinds] = self._drawn(sites)
        return [others for others in self._known[kinds] if not set(others) & set(members)]

    def _drawn(self, sites: list[Site]) -> list[Members]:
        rng = np.random.default_rng(self.seed)
        if len(sites) == 1:
            able = others_like(self.model, sites[0])
            return [(able[i],) for i in rng.permutation(len(able))[: self.count + 1]]
        found: dict[frozenset[Member], Members] = {}
        for _ in range(self.count):
            members: list[Member] = []
            for site in sites:
                able = [other for other in others_like(self.model, site) if other not in members]
                if not able:
                    return []
                members.append(able[int(rng.integers(len(able)))])
            found[frozenset(members)] = tuple(members)
        return list(found.values())


def _kind(site: Site) -> str:
    return f"{site.name} {site.head is not None} {site.expert is not None}"


def _plain(cell: object) -> object:
    return float(cell) if isinstance(cell, np.floating) else cell
