"""Strength against length and accuracy, along the direction and along random ones: ThinkEdit's first experiment."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from probes.figures.plots import Dose
from steer.evaluation._evaluate import Arm, evaluate
from steer.evaluation.outcomes import Outcomes
from steer.evaluation.statistics import interval_of_mean
from steer.methods.thinkedit import LengthReading
from steer.methods.thinkedit_run import ThinkEditRun
from steer.tasks.task import Problem


@dataclass(frozen=True)
class SweepRecord:
    """What each strength did, in all layers (`layer` is None) or in one; `random` pools `draws` random directions."""

    layer: int | None
    position: str
    problems: int
    draws: int
    plain: Dose = field(metadata={"where": "A dose in {whole}"})
    direction: tuple[Dose, ...] = field(metadata={"where": "A dose in {whole}"})
    random: tuple[Dose, ...] = field(metadata={"where": "A dose in {whole}"})

    @classmethod
    def of(
        cls,
        run: ThinkEditRun,
        reading: LengthReading,
        problems: Sequence[Problem],
        strengths: Sequence[float],
        *,
        layer: int | None,
        draws: int,
        batch_size: int,
    ) -> "SweepRecord":
        """Every strength on the same problems, along the reading's directions and along random ones of their norms."""
        layers = None if layer is None else [layer]
        nulls = [reading.at_random(seed) for seed in range(draws)]
        arms: dict[str, Arm] = {}
        for strength in strengths:
            arms[f"direction {strength}"] = reading.steering(strength, layers=layers)
            arms[f"random {strength}"] = [null.steering(strength, layers=layers) for null in nulls]
        outcomes = evaluate(run.model, run.task, problems, arms, sampling=run.sampling, batch_size=batch_size).arms
        along, beside = (
            tuple(_dose(strength, outcomes[f"{arm} {strength}"]) for strength in strengths)
            for arm in ("direction", "random")
        )
        return cls(layer, reading.position, len(problems), draws, _dose(0.0, outcomes["plain"]), along, beside)


def _dose(strength: float, outcomes: Outcomes) -> Dose:
    length, right = outcomes.length.mean(1), outcomes.correct.mean(1)
    return Dose(
        strength,
        length=float(length.mean()),
        length_interval=interval_of_mean(length),
        accuracy=float(right.mean()),
        accuracy_interval=interval_of_mean(right),
        truncation=float(outcomes.truncated.mean()),
    )
