"""What each picture of the report says, in words."""

from collections.abc import Sequence

from probes.figures.plots import Dose
from probes.figures.style import Range
from steer.evaluation.verdicts import on_groups
from steer.report.arms import ArmsRecord
from steer.report.record import EvidenceRecord, HeadsRecord, LayerRecord
from steer.report.sweeps import SweepRecord


def on_evidence(evidence: EvidenceRecord) -> str:
    """Layer by layer, whether the line leaves the bands and the confounds."""
    found: dict[str, list[str]] = {}
    for layer in evidence.layers:
        found.setdefault(_fault(layer), []).append(f"L{layer.layer}")
    good = found.pop("", [])
    said = f"In {_listed(good)} the line lies above both bands and every confound: evidence. " if good else ""
    return said + " ".join(f"In {_listed(layers)} it {fault}: no evidence there." for fault, layers in found.items())


def _fault(layer: LayerRecord) -> str:
    """What the line does not get above; nothing where it does."""
    if not layer.auroc > layer.random[1]:
        return "lies inside the band of random directions, or below it"
    if not layer.auroc > layer.null[1]:
        return "lies inside the band of shuffled labels, or below it"
    as_good = [name for name, value in layer.confounds.items() if value >= layer.auroc]
    return f"tells no more than {_listed(as_good)} alone" if as_good else ""


def on_heads(heads: HeadsRecord) -> str:
    """How much of what is written towards short thinking the edited heads write."""
    written = [[max(0.0, score) for score in row] for row in heads.centred]
    whole = sum(map(sum, written)) or 1.0
    own = sum(written[layer][head] for layer, head in heads.edited)
    n = sum(map(len, written))
    return (
        f"The {len(heads.edited)} outlined heads, {len(heads.edited) / n:.0%} of {n}, write {own / whole:.0%} of what "
        "all heads write towards short thinking, centred. Whether that matters is for the arms to say."
    )


def on_sweep(sweep: SweepRecord) -> str:
    """At the strongest strength each way, thinking tokens along the direction beside those along random ones."""
    ends = sorted(sweep.direction, key=lambda dose: dose.strength)
    beside = {dose.strength: dose for dose in sweep.random}
    chosen = [ends[0], ends[-1]] if len(ends) > 1 else ends
    return " ".join(_end(dose, beside.get(dose.strength)) for dose in chosen)


def _end(dose: Dose, random: Dose | None) -> str:
    told = f"At {dose.strength:+g} thinking takes {_tokens(dose)} tokens"
    if random is None:
        return f"{told}; nothing at random stands beside it."
    told += f", along random directions {_tokens(random)}"
    own, other = _known(dose.length_interval), _known(random.length_interval)
    if own is None or other is None:
        return f"{told}."
    apart = own[0] > other[1] or own[1] < other[0]
    return f"{told}: {'the direction does it' if apart else 'the intervals overlap, so no effect is shown'}."


def _known(bounds: Range) -> tuple[float, float] | None:
    low, high = bounds
    return None if low is None or high is None else (low, high)


def _tokens(dose: Dose) -> str:
    bounds = _known(dose.length_interval)
    if dose.length is None or bounds is None:
        return "an unknown number of"
    return f"{dose.length:.1f} [{bounds[0]:.1f}, {bounds[1]:.1f}]"


def on_arms(arms: ArmsRecord) -> list[str]:
    """The edit beside its controls, on all problems and on the marked ones."""
    groups = (None, arms.subgroup) if arms.subgroup else (None,)
    return on_groups("edited", {group: {arm: own.on(group) for arm, own in arms.report.items()} for group in groups})


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
