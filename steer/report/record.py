"""The record of a run: every number that a report shows, with where it came from, as plain JSON."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from probes.evidence._separation import evidence_for
from probes.fields import from_plain, keys_of, plain_fields
from probes.files import check_keys
from probes.model.loading import identity_of
from probes.tables import Brief
from steer.methods.thinkedit_run import ThinkEditRun
from steer.report.arms import ArmsRecord
from steer.report.examples import CompletionsRecord
from steer.report.sweeps import SweepRecord

FORMAT = "thinksteer run 1"
# The paper's range for all layers, ±0.08; in one layer it goes to ±1.
ALL_LAYERS = (-0.08, -0.04, -0.02, 0.02, 0.04, 0.08)
ONE_LAYER = (-0.5, -0.25, -0.1, 0.1, 0.25, 0.5)

Range = tuple[float, float]


@dataclass(frozen=True)
class EditRecord:
    """The edit that was chosen. `norm_over_stream_norm` is that of the direction, `fold_error` is in logits."""

    method: str
    setting: str
    site: str
    position: str
    heads: tuple[str, ...]
    auroc: float
    norm_over_stream_norm: float
    fold_error: float

    @classmethod
    def of(cls, run: ThinkEditRun) -> "EditRecord":
        return cls(
            method=run.recipe.method,
            setting=str(run.selected),
            site=str(run.direction.site),
            position=run.selected.position,
            heads=tuple(f"L{layer}H{head}" for layer, head in run.heads),
            auroc=run.auroc,
            norm_over_stream_norm=run.direction.norm / run.direction.stream_norm,
            fold_error=run.fold_error(),
        )


@dataclass(frozen=True)
class LayerRecord:
    """What speaks for the direction of one layer (`probes.evidence.LayerEvidence`)."""

    layer: int
    auroc: float
    null: Range
    random: Range
    cosine: Range
    confounds: Mapping[str, float]
    p: float


@dataclass(frozen=True)
class EvidenceRecord:
    """What speaks for the direction, layer by layer, on the held-out half of the probe split."""

    site: str
    position: str
    n_long: int
    n_short: int
    layers: tuple[LayerRecord, ...] = field(metadata={"where": "Layer {key} in the record's evidence"})

    @classmethod
    def of(cls, run: ThinkEditRun) -> "EvidenceRecord":
        position, site = run.selected.position, run.direction.site.name
        short, long = run.readings[position].split.spans(position)
        layers = tuple(
            LayerRecord(e.site.layer, e.auroc, e.null, e.random, e.cosine, e.confounds, e.p)
            for e in evidence_for(run.model, long, short, site=site).layers
        )
        return cls(site, position, len(long), len(short), layers)


@dataclass(frozen=True)
class HeadsRecord:
    """What each head writes towards short thinking, [n_layers n_heads], and the heads (layer, head) that are edited."""

    position: str
    raw: tuple[tuple[float, ...], ...]
    centred: tuple[tuple[float, ...], ...]
    edited: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, run: ThinkEditRun) -> "HeadsRecord":
        reading = run.readings[run.selected.position]
        raw, centred = (
            tuple(map(tuple, reading.scores(ranking).scores.tolist())) for ranking in ("raw", "centred")
        )  # fmt: skip
        return cls(run.selected.position, raw, centred, run.heads)


@dataclass(frozen=True)
class ProvenanceRecord:
    """Where the numbers came from."""

    model: Mapping[str, Any]
    task: str
    sampling: Mapping[str, Any]
    splits: Mapping[str, str]
    seeds: Mapping[str, Any]
    estimator: str
    data: str
    versions: Mapping[str, str]
    command: str

    @classmethod
    def of(cls, run: ThinkEditRun, draws: int, command: str) -> "ProvenanceRecord":
        birth = run.direction.provenance
        return cls(
            model=identity_of(run.model),
            task=run.task.name,
            sampling=asdict(run.sampling),
            splits=_splits(run),
            seeds={
                "sampling": run.sampling.seed,
                "random directions of the sweeps": list(range(draws)),
                "bootstrap (95 %, percentile, 2,000 resamples over problems)": 0,
            },
            estimator=birth.estimator,
            data=birth.data,
            versions={**birth.versions, "python": platform.python_version()},
            command=command,
        )


def _splits(run: ThinkEditRun) -> dict[str, str]:
    split = run.readings[run.selected.position].split
    select, report = len(run.selection.problems), len(run.report.problems)
    return {
        "probe": f"{len(split.short)} completions that think in fewer than {split.below:g} tokens, and "
        f"{len(split.long)} in more than {split.above:g}: directions, head scores",
        "select": f"{select} problems: the choice among {run.selection.n_settings} settings, the sweeps",
        "report": f"{report} problems: the arms, the completions, the AUROC of the edited layer",
    }


@dataclass(frozen=True, repr=False)
class RunRecord(Brief):
    """Everything a report shows of a run; numbers that are not known are NaN, and null in JSON.

    >>> from steer.report import RunRecord
    >>> try:
    ...     RunRecord.from_dict({"format": "another"})
    ... except ValueError as error:
    ...     print(str(error)[:27])
    The record lacks keys: edit
    """

    format: str
    edit: EditRecord
    evidence: EvidenceRecord
    heads: HeadsRecord
    sweeps: tuple[SweepRecord, ...] = field(metadata={"where": "Sweep {key} of the record"})
    arms: ArmsRecord
    completions: CompletionsRecord
    provenance: ProvenanceRecord

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
        """The record of a run, its sweeps of strength run here.

        Args:
            n: problems of the selection split for the sweeps of strength; 0 leaves the sweeps out.
            draws: random directions beside each sweep.
            strengths, layer_strengths: of the sweep in all layers, and of the one in the middle layer.
            command: what was typed to make the run.
        """
        reading, problems = run.readings["thinking"], run.selection.problems[:n]
        middle = len(reading.directions) // 2
        sweeps = tuple(
            SweepRecord.of(run, reading, problems, doses, layer=layer, draws=draws, batch_size=batch_size)
            for layer, doses in ([(None, strengths), (middle, layer_strengths)] if n else [])
        )
        return cls(
            format=FORMAT,
            edit=EditRecord.of(run),
            evidence=EvidenceRecord.of(run),
            heads=HeadsRecord.of(run),
            sweeps=sweeps,
            arms=ArmsRecord.of(run),
            completions=CompletionsRecord.of(run),
            provenance=ProvenanceRecord.of(run, draws, command),
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as `run.json` holds it."""
        return plain_fields(self)

    @classmethod
    def from_dict(cls, values: object) -> "RunRecord":
        """A record from what `run.json` holds.

        Raises ValueError for a record of another format, for keys that are unknown or missing, by name, and for values
        of another type.
        """
        rows = keys_of(values, "The record")
        check_keys(rows, [part.name for part in fields(cls)], "The record")
        if rows["format"] != FORMAT:
            raise ValueError(f"The record has format {rows['format']!r}, and this version reads {FORMAT!r}.")
        try:
            return from_plain(cls, rows, "The record")
        except TypeError as error:
            raise ValueError(
                f"The record does not hold what its keys promise ({error}): export the run again."
            ) from error
