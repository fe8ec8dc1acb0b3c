"""What each served recipe has touched since the start: the logs of all its batches, added up."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from steer.runtime.firelog import FireLog

Key = tuple[int, str]  # step and phase


@dataclass(frozen=True)
class FiredRow:
    """Of a step in a phase: tokens touched, and the mean of ‖Δ‖/‖x‖ over them."""

    step: int
    site: str
    kind: str
    scope: str
    phase: str
    tokens: int
    mean_ratio: float

    def plus(self, other: "FiredRow") -> "FiredRow":
        """Both, as one."""
        tokens = self.tokens + other.tokens
        total = self.tokens * self.mean_ratio + other.tokens * other.mean_ratio
        return replace(self, tokens=tokens, mean_ratio=total / tokens)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


class Fired:
    """By recipe, step and phase. The worker's thread alone writes and reads it."""

    def __init__(self, names: Iterable[str]) -> None:
        self._sums: dict[str, dict[Key, FiredRow]] = {name: {} for name in names}

    def add(self, name: str, log: FireLog) -> None:
        """A batch is over."""
        self._sums[name] = _added(self._sums[name], log)

    def rows(self, now: tuple[str, FireLog] | None = None) -> dict[str, list[FiredRow]]:
        """All so far, with the log of the batch that is written now."""
        sums = self._sums if now is None else {**self._sums, now[0]: _added(self._sums[now[0]], now[1])}
        return {name: [found[key] for key in sorted(found)] for name, found in sums.items()}


def _added(sums: dict[Key, FiredRow], log: FireLog) -> dict[Key, FiredRow]:
    log.end_pass()
    sums = dict(sums)
    for step, site, kind, scope, phase, tokens, ratio, *_ in log.table().rows:
        if tokens:
            new = FiredRow(step, site, kind, scope, phase, tokens, ratio)
            sums[step, phase] = sums[step, phase].plus(new) if (step, phase) in sums else new
    return sums
