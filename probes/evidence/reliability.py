"""Does a confidence mean what it says: against how often answers of that confidence are right."""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from probes.evidence.signals import numbered
from probes.tables import Shown, Table

Interval = tuple[float, float]
ASK_CONFIDENCE = " After your answer, state how sure you are that it is right as 'Confidence: N%'."

_STATED = re.compile(
    r"\bconfidence(?:\s+(?:level|score|rating))?(?:\s+in\s+(?:this|that|my|the)\s+(?:final\s+)?(?:answer|solution|result))?"
    r"(?:\s*\([^()\n]*\))?"  # a scale
    r"(?:[\s:=*_`$~≈<>\"'\[{]|[-–—](?=\s)|\b(?:is|of|at|about|around|approximately|roughly)\b|\\boxed)*"
    r"(\d+(?:[.,]\d+)?|\.\d+)\s*(?:(\\?%|per\s?cent)|(?:/|out\s+of)\s*(\d+(?:\.\d+)?))?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Bin:
    """Answers of about one confidence: how many, their mean confidence, and the share that is right.

    >>> from probes.evidence import Bin
    >>> Bin(n=20, confidence=0.9, accuracy=0.75).accuracy
    0.75
    """

    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, eq=False, repr=False)
class Calibration(Shown):
    """Confidences against answers. `ece` is the mean over bins, weighted by their answers, of |accuracy - confidence|
    (Guo et al. 2017), with a 95 % interval over problems; a perfect forecaster's is above 0 on finitely many answers,
    and `ece_chance` is the mean of what it would be. `brier` = `reliability` - `resolution` + `uncertainty` +
    `within`, in which the last is what the spread of confidences inside the bins adds (Murphy 1973; Stephenson et al.
    2008).

    >>> import numpy as np
    >>> from probes.evidence import calibration
    >>> found = calibration(np.array([0.9] * 10), np.array([True] * 5 + [False] * 5), range(10))
    >>> round(found.ece, 2), round(found.brier, 2), found.bins[-1].n
    (0.4, 0.41, 10)
    """

    n: int
    ece: float
    ece_interval: Interval
    ece_chance: float
    brier: float
    brier_interval: Interval
    reliability: float
    resolution: float
    uncertainty: float
    within: float
    bins: tuple[Bin, ...]

    def table(self) -> Table:
        """A row for each bin that has answers."""
        rows = [(b.n, b.confidence, b.accuracy, b.accuracy - b.confidence) for b in self.bins]
        low, high = self.ece_interval
        title = f"{self.n} answers, ECE {self.ece:.3f} [{low:.3f}, {high:.3f}], Brier {self.brier:.3f}"
        return Table(("answers", "confidence", "right", "difference"), tuple(rows), title)


def calibration(
    confidence: Float[np.ndarray, " n"],
    correct: Bool[np.ndarray, " n"],
    problems: Sequence[Hashable],
    *,
    bins: int = 10,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> Calibration:
    """Confidences between 0 and 1, in `bins` of equal width, against whether each answer is right.

    Raises ValueError for a confidence that is none, or where the numbers differ.

    >>> import numpy as np
    >>> from probes.evidence import calibration
    >>> calibration(np.array([1.2]), np.array([True]), [0])
    Traceback (most recent call last):
        ...
    ValueError: A confidence is a number between 0 and 1, but 1.2 was given. Divide percentages by 100.
    """
    confidence = np.asarray(confidence, dtype=float)
    if not len(confidence) == len(correct) == len(problems) > 0:
        raise ValueError(
            f"{len(confidence)} confidences came with {len(correct)} answers, {len(problems)} problems: give one each."
        )
    if (bad := confidence[~((confidence >= 0) & (confidence <= 1))]).size:
        raise ValueError(
            f"A confidence is a number between 0 and 1, but {bad[0]:g} was given. Divide percentages by 100."
        )
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    groups = numbered(problems)
    rng = np.random.default_rng(seed)
    n = groups.max() + 1
    weights = np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), n_bootstrap)])[:, groups]
    hits = np.asarray(correct, dtype=float)
    count, sure, right = (_binned(weights * x, place, bins) for x in (np.ones_like(hits), confidence, hits))
    ece = np.abs(sure - right).sum(1) / count.sum(1)
    brier = (weights * (confidence - hits) ** 2).sum(1) / weights.sum(1)
    drawn = (rng.random((n_bootstrap, len(hits))) < confidence).astype(float)
    chance = np.abs(_binned(drawn, place, bins) - sure[0]).sum(1) / len(hits)
    used = count[0] > 0
    share, mean, rate = count[0][used] / len(hits), sure[0][used] / count[0][used], right[0][used] / count[0][used]
    reliability, resolution = (
        float((share * (mean - rate) ** 2).sum()),
        float((share * (rate - hits.mean()) ** 2).sum()),
    )
    uncertainty = float(hits.mean() * (1 - hits.mean()))
    return Calibration(
        n=len(hits),
        ece=float(ece[0]),
        ece_interval=_interval(ece[1:]),
        ece_chance=float(chance.mean()),
        brier=float(brier[0]),
        brier_interval=_interval(brier[1:]),
        reliability=reliability,
        resolution=resolution,
        uncertainty=uncertainty,
        within=float(brier[0]) - (reliability - resolution + uncertainty),
        bins=tuple(Bin(int(c), float(m), float(r)) for c, m, r in zip(count[0][used], mean, rate, strict=True)),
    )


def stated_confidence(text: str) -> float | None:
    """The confidence that a text states in words, between 0 and 1: `Confidence: 85%`, `confidence is 0.85`, `Confidence
    (0-10): 8/10`.

    The last one counts; None where there is none. `ASK_CONFIDENCE` asks for it (after Zeng et al. 2025, Thinking Out
    Loud). A number above 1 without a unit is a percentage.

    >>> from probes.evidence import stated_confidence
    >>> stated_confidence("7. Confidence: 85%"), stated_confidence("Confidence: 0.6"), stated_confidence("7")
    (0.85, 0.6, None)
    """
    found = _STATED.findall(text)
    if not found:
        return None
    stated, percent, most = found[-1]
    number = float(stated.replace(",", "."))
    of = float(most) if most else 100.0 if percent or number > 1 else 1.0
    return number / of if number <= of and of else None


def _binned(values: Float[np.ndarray, "draws n"], place: np.ndarray, bins: int) -> Float[np.ndarray, "draws bins"]:
    return np.asarray(values @ (place[:, None] == np.arange(bins)).astype(float))


def _interval(draws: Float[np.ndarray, " draws"]) -> Interval:
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)
