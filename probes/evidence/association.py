"""Which experts go with which tokens: nPMI as RICE scores it, with intervals, ties and false-discovery control.

RICE (Wang et al. 2025, arXiv 2505.14681) counts, for a marker x with M occurrences among T tokens, how often an expert
is chosen at the marker (k) and at all tokens (K): nPMI = [log(k/M) + log(T/K)] / log(T/k). An expert's score is the sum
over markers of sign · nPMI: `<think>` +1, `</think>` -1, `Alternatively` -1. All facts on RICE are second-hand, as no
code is public; how it tokenises "Alternatively", and which tokens T counts, is not known. With few markers many experts
share k = M, and then nPMI ranks by rarity: so ties are shown, and a minimum of choices is asked for. Beside it stand
the risk difference of SteerMoE (Fayyaz et al. 2025) and the mutual information.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Real

from probes.activations.experts import ExpertReading
from probes.late import special, stats
from probes.model.routers import Expert
from probes.tables import Shown, Table

if TYPE_CHECKING:
    import pandas

Counts = float | Real[np.ndarray, "..."]
Values = float | Float[np.ndarray, "..."]
_CHUNK = 64


def npmi(k: Counts, routed: Counts, markers: Counts, tokens: Counts) -> Values:
    """Normalised pointwise mutual information of a marker and an expert, in [-1, 1]; -1 where they never meet.

    [log(k/M) + log(T/K)] / log(T/k) *(Bouma 2009, Wang et al. 2025)*; numbers, or arrays that broadcast.

    Args:
        k: occurrences of the marker at which the expert was chosen.
        routed: tokens at which it was chosen, K. markers, tokens: how many there are of either, M and T.

    >>> from probes.evidence import npmi
    >>> [round(float(npmi(k, routed=50, markers=10, tokens=1000)), 2) for k in (0, 1, 5, 10)]
    [-1.0, 0.1, 0.43, 0.65]
    """
    k, routed, markers, tokens = np.broadcast_arrays(*(np.asarray(x, float) for x in (k, routed, markers, tokens)))
    with np.errstate(divide="ignore", invalid="ignore"):
        joint = np.log(tokens / k)
        value = (np.log(k / markers) + np.log(tokens / routed)) / joint
    value = np.where(joint == 0, 1.0, value)  # every token is the marker, and the expert always chosen
    return np.clip(np.where(k == 0, -1.0, value), -1.0, 1.0)


def risk_difference(k: Counts, routed: Counts, markers: Counts, tokens: Counts) -> Values:
    """How much more often the expert is chosen at the marker than elsewhere: k/M - (K - k)/(T - M).

    In [-1, 1], undefined where all tokens are markers, or none is *(Fayyaz et al. 2025)*. The arguments are those
    of `npmi`.

    >>> from probes.evidence import risk_difference
    >>> round(risk_difference(5, routed=50, markers=10, tokens=1000), 3)
    0.455
    """
    return k / markers - (routed - k) / (tokens - markers)


def mutual_information(k: Counts, routed: Counts, markers: Counts, tokens: Counts) -> Values:
    """Of two yes-or-no facts on a token, that it is the marker and that it chose the expert; in bits.

    The arguments are those of `npmi`.

    >>> from probes.evidence import mutual_information
    >>> round(float(mutual_information(10, routed=10, markers=10, tokens=20)), 3)
    1.0
    >>> round(float(mutual_information(5, routed=10, markers=10, tokens=20)), 3)
    0.0
    """
    cells = ((k, 1, 1), (markers - k, 1, 0), (routed - k, 0, 1), (tokens - markers - routed + k, 0, 0))
    total = np.zeros(())
    for count, is_marker, is_chosen in cells:
        p = count / tokens
        alone = (markers if is_marker else tokens - markers) * (routed if is_chosen else tokens - routed) / tokens**2
        total = total + special.xlogy(p, np.where(p > 0, p / np.where(alone > 0, alone, 1), 1))
    out: float | np.ndarray = total / np.log(2)
    return out


@dataclass(frozen=True, eq=False, repr=False)
class Association(Shown):
    """The score of each expert of each sparse layer; NaN for those chosen fewer than `minimum` times.

    `low` and `high` are a 95 % bootstrap over completions. `q` is the p of no association: within each completion the
    markers could as well stand at any other token (Cochran-Mantel-Haenszel; over markers, the signed z's are summed),
    after Benjamini and Hochberg over all scored experts. `left_out` are markers that the
    vocabulary lacks or the completions never hold; their terms are missing from every score.

    >>> from probes import generate, load
    >>> from probes.activations import read_experts
    >>> from probes.evidence import associate
    >>> model = load("organism")
    >>> reading = read_experts(model, generate(model, ["a 3 b +4 c *7", "a 5 b -2 c +9"]), ["Okay"])
    >>> association = associate(reading, {"Okay": 1.0}, minimum=1, draws=20)
    >>> association.score.shape, association.occurrences, len(association.top(3))
    ((4, 8), {'Okay': 1}, 3)
    """

    layers: tuple[int, ...]
    signs: dict[str, float]
    score: Float[np.ndarray, "layers experts"]
    low: Float[np.ndarray, "layers experts"]
    high: Float[np.ndarray, "layers experts"]
    q: Float[np.ndarray, "layers experts"]
    npmi: dict[str, Float[np.ndarray, "layers experts"]]
    routed: Float[np.ndarray, "layers experts"]
    tokens: int
    occurrences: dict[str, int]
    minimum: int
    left_out: tuple[str, ...]

    @property
    def load(self) -> Float[np.ndarray, "layers experts"]:
        """The share of all tokens that chose each expert."""
        return self.routed / self.tokens

    def top(self, count: int) -> list[Expert]:
        """The experts with the highest scores over the whole model, highest first; ties in the model's order."""
        return self._ranked[:count]

    def bottom(self, count: int) -> list[Expert]:
        """The experts with the lowest scores, lowest first."""
        return self._ranked[-count:][::-1]

    def matched(self, experts: list[Expert], *, seed: int, near: int = 8) -> list[Expert]:
        """The control: for each expert another one, drawn among the `near` closest in load, none twice.

        Raises ValueError where too few experts are left.
        """
        rng, taken = np.random.default_rng(seed), set(experts)
        found = []
        for expert in experts:
            others = [other for other in self._ranked if other not in taken]
            if not others:
                raise ValueError(f"All {len(self._ranked)} scored experts are taken: there is none to compare with.")
            others.sort(key=lambda other: abs(self.load[self._at(other)] - self.load[self._at(expert)]))
            found.append(others[rng.integers(min(near, len(others)))])
            taken.add(found[-1])
        return found

    def table(self, count: int = 10) -> Table:
        """The highest scores, with how many other experts share each."""
        rows = []
        for rank, expert in enumerate(self.top(count), start=1):
            at = self._at(expert)
            ties = int((np.abs(self.score - self.score[at]) < 1e-12).sum()) - 1
            each = tuple(f"{values[at]:+.3f}" for values in self.npmi.values())
            interval = f"[{self.low[at]:+.3f}, {self.high[at]:+.3f}]"
            name = f"L{expert[0]}E{expert[1]}"
            rows.append((rank, name, f"{self.score[at]:+.3f}", interval, f"{self.q[at]:.2g}", ties,
                         f"{self.load[at]:.3f}", *each))  # fmt: skip
        columns = ("rank", "expert", "score", "95 %", "q", "ties", "load", *(f"nPMI {name}" for name in self.npmi))
        left = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        seen = ", ".join(f"{n} × {name}" for name, n in self.occurrences.items())
        return Table(columns, tuple(rows), f"{seen} among {self.tokens} tokens{left}")

    def to_frame(self) -> "pandas.DataFrame":
        """All scored experts as a frame of pandas, highest first."""
        return self.table(int(np.isfinite(self.score).sum())).to_frame()

    def _at(self, expert: Expert) -> tuple[int, int]:
        return self.layers.index(expert[0]), expert[1]

    @cached_property
    def _ranked(self) -> list[Expert]:
        flat = np.where(np.isnan(self.score), -np.inf, self.score).ravel()
        order = [int(i) for i in np.argsort(-flat, kind="stable") if np.isfinite(flat[i])]
        width = self.score.shape[1]
        return [(self.layers[i // width], i % width) for i in order]


def associate(
    reading: ExpertReading, signs: Mapping[str, float], *, minimum: int = 10, draws: int = 1000, seed: int = 0
) -> Association:
    """Score experts by their signed nPMI with markers, over completions that are resampled for the intervals.

    Raises ValueError where a marker was not read, where none of them occurs, or no expert is chosen often enough.

    >>> from probes import generate, load
    >>> from probes.activations import read_experts
    >>> from probes.evidence import associate
    >>> model = load("organism")
    >>> completions = generate(model, ["a 3 b +4 c *7", "a 5 b -2 c +9"])
    >>> signs = {"Okay": 1.0, "Alternatively": -1.0}
    >>> association = associate(read_experts(model, completions, list(signs)), signs, minimum=1, draws=20)
    >>> association.signs, association.left_out
    ({'Okay': 1.0}, ('Alternatively',))
    """
    known = [*reading.classes, *reading.lacking]
    if unread := [marker for marker in signs if marker not in known]:
        raise ValueError(f"{unread[0]!r} was not read with these completions. Read: {', '.join(known)}.")
    total = reading.total()
    often = {m: int(total.tokens[total.classes.index(m)]) for m in signs if m in reading.classes}
    present = {marker: sign for marker, sign in signs.items() if often.get(marker)}
    if not present:
        raise ValueError(f"None of {', '.join(signs)} occurs in the completions, so that nothing goes with it.")
    at = [reading.classes.index(name) for name in ("all", *present)]
    counts = reading.counts[:, at].double().numpy()  # [completions 1+markers layers experts]
    tokens = reading.tokens[:, at].double().numpy()
    kept: Bool[np.ndarray, "layers experts"] = counts[:, 0].sum(0) >= minimum
    if not kept.any():
        raise ValueError(f"No expert is chosen {minimum} times by {int(tokens[:, 0].sum())} tokens. Lower the minimum.")
    weights = np.array(list(present.values()))
    each = _npmi_of(counts.sum(0)[None], tokens.sum(0)[None])[0]  # [markers layers experts]
    score = np.tensordot(weights, each, 1)
    drawn = _resampled(counts, tokens, weights, draws, seed)
    q = np.full(score.shape, np.nan)
    q[kept] = stats.false_discovery_control(_p_of_none(counts, tokens, weights)[kept])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    hidden = np.where(kept, 0.0, np.nan)
    return Association(
        reading.layers,
        present,
        score + hidden,
        low + hidden,
        high + hidden,
        q,
        dict(zip(present, each, strict=True)),
        counts[:, 0].sum(0),
        int(tokens[:, 0].sum()),
        {marker: often[marker] for marker in present},
        minimum,
        tuple(marker for marker in signs if marker not in present),
    )


def _p_of_none(counts: np.ndarray, tokens: np.ndarray, signs: np.ndarray) -> Float[np.ndarray, "layers experts"]:
    """Two-sided; every completion is a stratum, in which the choices and the number of markers are given."""
    routed, total = counts[:, :1], tokens[:, :1, None, None]
    markers = tokens[:, 1:, None, None]
    excess = (counts[:, 1:] - markers * routed / total).sum(0)
    spread = markers * (total - markers) * routed * (total - routed) / (total**2 * np.maximum(total - 1, 1))
    z = excess / np.sqrt(np.maximum(spread.sum(0), np.finfo(float).tiny))
    out: np.ndarray = 2 * stats.norm.sf(np.abs(np.tensordot(np.sign(signs), z, 1)) / np.sqrt(len(signs)))
    return out


def _npmi_of(
    counts: Float[np.ndarray, "draws classes layers experts"], tokens: Float[np.ndarray, "draws classes"]
) -> Float[np.ndarray, "draws markers layers experts"]:
    whole, many = counts[:, :1], tokens[:, :, None, None]
    return np.asarray(npmi(counts[:, 1:], whole, many[:, 1:], many[:, :1]))


def _resampled(
    counts: np.ndarray, tokens: np.ndarray, signs: np.ndarray, draws: int, seed: int
) -> Float[np.ndarray, "draws layers experts"]:
    """The score on completions drawn with replacement; draws without a marker are drawn again by leaving them out."""
    rng, n = np.random.default_rng(seed), len(counts)
    found = []
    for start in range(0, draws, _CHUNK):
        times = rng.multinomial(n, np.full(n, 1 / n), size=min(_CHUNK, draws - start)).astype(float)
        summed, many = np.tensordot(times, counts, 1), times @ tokens
        held = (many > 0).all(1)
        found.append(np.tensordot(_npmi_of(summed[held], many[held]), signs, ((1,), (0,))))
    return np.concatenate(found)
