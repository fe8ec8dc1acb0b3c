"""The record of a run: every number that a report shows, with where it came from, as plain JSON."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from probes.evidence._separation import evidence_for
from probes.files import check_keys
from probes.model.loading import identity_of
from probes.tables import Brief
from steer.checkpoints._diff import Difference
from steer.evaluation._evaluate import Arm, evaluate
from steer.evaluation.evaluation import Score
from steer.evaluation.outcomes import Outcomes
from steer.evaluation.statistics import interval_of_mean
from steer.methods.thinkedit import LengthReading
from steer.methods.thinkedit_run import ThinkEditRun
from steer.report.examples import side_by_side
from steer.tasks.task import Problem

FORMAT = "thinksteer run 1"
# The paper's range for all layers, ±0.08; in one layer it goes to ±1.
ALL_LAYERS = (-0.08, -0.04, -0.02, 0.02, 0.04, 0.08)
ONE_LAYER = (-0.5, -0.25, -0.1, 0.1, 0.25, 0.5)

_DOSE = ("strength", "length", "length_interval", "accuracy", "accuracy_interval", "truncation")
_SWEEP = ("layer", "position", "problems", "draws", "plain", "direction", "random")
_LAYER = ("layer", "auroc", "null", "random", "cosine", "confounds", "p")
_EXAMPLE = ("kind", "problem", "answer", "subgroup", "plain", "edited")
_SIDE = ("correct", "thinking_tokens", "truncated", "left_out", "prompt_tokens", "read", "tokens", "projections")
_KEYS: dict[str, tuple[str, ...]] = {
    "record": ("format", "edit", "evidence", "heads", "sweeps", "arms", "completions", "provenance"),
    "edit": ("method", "setting", "site", "position", "heads", "auroc", "norm_over_stream_norm", "fold_error"),
    "evidence": ("site", "position", "n_long", "n_short", "layers"),
    "heads": ("position", "raw", "centred", "edited"),
    "arms": ("subgroup", "problems", "samples", "report", "selection"),
    "completions": ("rule", "site", "midpoint", "scale", "examples"),
    "provenance": ("model", "task", "sampling", "splits", "seeds", "estimator", "data", "versions", "command"),
}


@dataclass(frozen=True, repr=False)
class RunRecord(Brief):
    """Everything a report shows of a ThinkEdit run, as JSON holds it; numbers that are not known are None."""

    edit: Mapping[str, Any]
    evidence: Mapping[str, Any]
    heads: Mapping[str, Any]
    sweeps: Sequence[Mapping[str, Any]]
    arms: Mapping[str, Any]
    completions: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        run: ThinkEditRun,
        *,
        n: int = 200,
        draws: int = 2,
        strengths: Sequence[float] = ALL_LAYERS,
        layer_strengths: Sequence[float] = ONE_LAYER,
        batch_size: int = 64,
        command: str = "",
    ) -> "RunRecord":
        """The record of a run.

        Args:
            n: problems of the selection split for the sweeps of strength; 0 leaves the sweeps out.
            draws: random directions beside each sweep.
            strengths, layer_strengths: of the sweep in all layers, and of the one in the middle layer.
        """
        reading = run.readings["thinking"]
        middle = len(reading.directions) // 2
        problems = run.selection.problems[:n]
        sweeps = [(None, strengths), (middle, layer_strengths)] if n else []
        parts = {
            "edit": _edit(run),
            "evidence": _evidence(run),
            "heads": _heads(run),
            "sweeps": [_sweep(run, reading, problems, layer, doses, draws, batch_size) for layer, doses in sweeps],
            "arms": {
                "subgroup": next((group for group in run.report.groups() if group), None),
                "problems": len(run.report.problems),
                "samples": run.report.score("plain").samples,
                "report": run.report.to_dict(),
                "selection": run.selection.to_dict(),
            },
            "completions": side_by_side(run),
            "provenance": _provenance(run, draws, command),
        }
        return cls(**_plain(parts))

    def to_dict(self) -> dict[str, Any]:
        """As `run.json` has it."""
        return {"format": FORMAT, **{field.name: getattr(self, field.name) for field in fields(self)}}

    @classmethod
    def from_dict(cls, words: Mapping[str, Any]) -> "RunRecord":
        """Refuse a record of another format, and keys that are unknown or missing, by name."""
        _check_record(words)
        return cls(**{name: value for name, value in words.items() if name != "format"})


def save(run: ThinkEditRun, folder: str | Path, record: RunRecord | None = None) -> Difference:
    """Export a run (`ThinkEditRun.export`) with its record beside it, as `run.json`: what a report is made of.

    Without `record`, one without sweeps is made. Raises as the export does.
    """
    text = json.dumps((record or RunRecord.of(run, n=0)).to_dict(), allow_nan=False)
    return run.export(folder, extras={"run.json": text + "\n"})


def _check_record(words: Mapping[str, Any]) -> None:
    _check(words, _KEYS["record"], "The record")
    if words["format"] != FORMAT:
        raise ValueError(f"The record has format {words['format']!r}, and this version reads {FORMAT!r}.")
    for part, keys in _KEYS.items():
        if part != "record":
            _check(words[part], keys, f"The part {part!r} of the record")
    for i, layer in enumerate(_rows(words["evidence"]["layers"], "evidence")):
        _check(layer, _LAYER, f"Layer {i} in the record's evidence")
    for i, sweep in enumerate(_rows(words["sweeps"], "sweeps")):
        _check(sweep, _SWEEP, f"Sweep {i} of the record")
        for dose in (sweep["plain"], *_rows(sweep["direction"], "sweep"), *_rows(sweep["random"], "sweep")):
            _check(dose, _DOSE, f"A dose in sweep {i} of the record")
    for i, example in enumerate(_rows(words["completions"]["examples"], "examples")):
        _check(example, _EXAMPLE, f"Example {i} of the record")
        for side in ("plain", "edited"):
            _check(example[side], _SIDE, f"The {side} side of example {i} of the record")
    _check_arms(words["arms"])


def _check_arms(arms: Mapping[str, Any]) -> None:
    scored, group = [field.name for field in fields(Score)], arms["subgroup"]
    for part in ("report", "selection"):
        for arm in ("plain", *(["edited"] if part == "report" else [])):
            if arm not in _mapping(arms[part], f"The part {part!r} of the arms"):
                raise ValueError(f"The record's {part} has no arm {arm!r}.")
        for arm, score in arms[part].items():
            where = f"The arm {arm!r} of the record's {part}"
            _check(score, [*scored, *([group] if group else [])], where)
            if group:
                _check(score[group], scored, f"{where}, {group},")


def _check(words: Any, keys: Sequence[str], where: str) -> None:
    check_keys(_mapping(words, where), keys, where)


def _mapping(words: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(words, Mapping):
        raise ValueError(f"{where} should hold keys, but is {words!r}.")
    return words


def _rows(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ValueError(f"The record's {where} should be a list, but is {value!r}.")
    return value


def _edit(run: ThinkEditRun) -> dict[str, Any]:
    return {
        "method": run.recipe.method,
        "setting": str(run.selected),
        "site": str(run.direction.site),
        "position": run.selected.position,
        "heads": [f"L{layer}H{head}" for layer, head in run.heads],
        "auroc": run.auroc,
        "norm_over_stream_norm": run.direction.norm / run.direction.stream_norm,
        "fold_error": run.fold_error(),
    }


def _evidence(run: ThinkEditRun) -> dict[str, Any]:
    position = run.selected.position
    short, long = run.readings[position].split.spans(position)
    found = evidence_for(run.model, long, short, site=run.direction.site.name)
    return {
        "site": run.direction.site.name,
        "position": position,
        "n_long": len(long),
        "n_short": len(short),
        "layers": [
            {
                "layer": layer.site.layer,
                "auroc": layer.auroc,
                "null": layer.null,
                "random": layer.random,
                "cosine": layer.cosine,
                "confounds": layer.confounds,
                "p": layer.p,
            }
            for layer in found.layers
        ],
    }


def _heads(run: ThinkEditRun) -> dict[str, Any]:
    reading = run.readings[run.selected.position]
    return {
        "position": run.selected.position,
        "raw": reading.scores("raw").scores.tolist(),
        "centred": reading.scores("centred").scores.tolist(),
        "edited": [list(head) for head in run.heads],
    }


def _sweep(
    run: ThinkEditRun,
    reading: LengthReading,
    problems: Sequence[Problem],
    layer: int | None,
    strengths: Sequence[float],
    draws: int,
    batch_size: int,
) -> dict[str, Any]:
    """The paper's first experiment, in all layers or in one, and the same along random directions."""
    layers = None if layer is None else [layer]
    controls = [reading.at_random(seed) for seed in range(draws)]
    arms: dict[str, Arm] = {}
    for strength in strengths:
        arms[f"direction {strength}"] = reading.steering(strength, layers=layers)
        arms[f"random {strength}"] = [control.steering(strength, layers=layers) for control in controls]
    done = evaluate(run.model, run.task, problems, arms, sampling=run.sampling, batch_size=batch_size).arms
    plain = _dose(0.0, done["plain"])
    along = [_dose(strength, done[f"direction {strength}"]) for strength in strengths]
    beside = [_dose(strength, done[f"random {strength}"]) for strength in strengths]
    return {
        "layer": layer,
        "position": reading.position,
        "problems": len(problems),
        "draws": draws,
        "plain": plain,
        "direction": along,
        "random": beside,
    }


def _dose(strength: float, outcomes: Outcomes) -> dict[str, Any]:
    length, right = outcomes.length.mean(1), outcomes.correct.mean(1)
    return {
        "strength": strength,
        "length": float(length.mean()),
        "length_interval": interval_of_mean(length),
        "accuracy": float(right.mean()),
        "accuracy_interval": interval_of_mean(right),
        "truncation": float(outcomes.truncated.mean()),
    }


def _provenance(run: ThinkEditRun, draws: int, command: str) -> dict[str, Any]:
    split, birth = run.readings[run.selected.position].split, run.direction.provenance
    select, report = len(run.selection.problems), len(run.report.problems)
    return {
        "model": identity_of(run.model),
        "task": run.task.name,
        "sampling": asdict(run.sampling),
        "splits": {
            "probe": f"{len(split.short)} completions that think in fewer than {split.below:g} tokens, and "
            f"{len(split.long)} in more than {split.above:g}: directions, head scores",
            "select": f"{select} problems: the choice among {len(run.selection.arms) - 1} settings, the sweeps",
            "report": f"{report} problems: the arms, the completions, the AUROC of the edited layer",
        },
        "seeds": {
            "sampling": run.sampling.seed,
            "random directions of the sweeps": list(range(draws)),
            "bootstrap (95 %, percentile, 2,000 resamples over problems)": 0,
        },
        "estimator": birth.estimator,
        "data": birth.data,
        "versions": {**birth.versions, "python": platform.python_version()},
        "command": command,
    }


def _plain(value: Any) -> Any:
    """JSON knows no NaN, no infinity and no tuple."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
