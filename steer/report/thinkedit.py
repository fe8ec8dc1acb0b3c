"""The report of a run: one HTML file that shows its record, and needs nothing but itself."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from html import escape
from typing import Any

from probes.figures.plots import Dose, Point, arms_figure, evidence_figure, heads_figure, sweep_figure
from probes.thinking.spans import POSITIONS
from steer.evaluation.evaluation import Score
from steer.methods.thinkedit import PUBLISHED
from steer.report.arms import ArmsRecord
from steer.report.completions import completions_section
from steer.report.html import (
    folded_away,
    interval,
    made_by,
    number,
    page,
    paragraph,
    plot,
    share,
    signed,
    split_tag,
    table,
    told,
)
from steer.report.record import EditRecord, EvidenceRecord, HeadsRecord, ProvenanceRecord, RunRecord
from steer.report.sweeps import SweepRecord
from steer.report.verdicts import on_arms, on_evidence, on_heads, on_sweep

ARMS = {
    "plain": "the model as it came",
    "published": f"ThinkEdit as published: {PUBLISHED}",
    "edited": "the edit that was chosen, as exported",
    "one_sided": "the best one-sided edit, at run time only",
    "lowest_heads": "control: the same edit on the lowest-scored heads",
    "random_heads": "control: the same edit on random heads, all draws",
    "random_direction": "control: the same heads, random directions of the same norm, all draws",
}
SECTIONS = {
    "done": "What was done",
    "evidence": "Evidence for the direction",
    "heads": "Heads",
    "sweep": "Strength",
    "length": "Accuracy against length",
    "arms": "Arms and controls",
    "completions": "Completions side by side",
    "provenance": "Provenance",
}


def render(record: RunRecord | Mapping[str, Any]) -> str:
    """One HTML page: figures, tables and completions of a record, or of its fields. All text in it is escaped.

    Raises ValueError for fields that are no record (`RunRecord.from_dict`), and where parts of it do not fit together.

    >>> from steer.report import render
    >>> try:
    ...     render({"format": "another"})
    ... except ValueError as error:
    ...     print(str(error)[:27])
    The record lacks keys: edit
    """
    record = record if isinstance(record, RunRecord) else RunRecord.from_dict(record)
    try:
        bodies = {
            "done": _done(record),
            "evidence": _evidence(record.evidence),
            "heads": _heads(record.heads),
            "sweep": "".join(map(_sweep, record.sweeps)) or "<p>No sweep was asked for.</p>",
            "length": _length(record.arms),
            "arms": _arms(record.arms),
            "completions": completions_section(record.completions),
            "provenance": _provenance(record.provenance),
        }
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise ValueError(
            f"The record does not hold what its keys promise ({error!r}): export the run again."
        ) from error
    title = f"{record.provenance.model['name']}, edited"
    made = {key: made_by(record.provenance.command) for key in bodies if key not in ("done", "provenance")}
    return page(title, [(key, name, bodies[key] + made.get(key, "")) for key, name in SECTIONS.items()])


def _done(record: RunRecord) -> str:
    edit, arms, provenance = record.edit, record.arms, record.provenance
    text = (
        f"{edit.method} on {provenance.model['name']}, task {provenance.task}. Completions were split by "
        f"thinking length; the direction from short to long thinking was read at {edit.site} "
        f"({_position(edit.position)}); the setting “{edit.setting}” was chosen by accuracy among "
        f"{len(arms.selection) - 1}, and edits {', '.join(edit.heads)}."
    )
    tiles = []
    for group in _groups(arms):
        before, after = (arms.report[arm].on(group) for arm in ("plain", "edited"))
        name = f"{group or 'all'} problems"
        tiles.append((f"{before.accuracy:.3f} → {after.accuracy:.3f}", f"accuracy, plain → edited, {name}"))
        change, bounds = signed(after.difference, after.difference_interval).split(" ", 1)
        tiles.append((change, f"{bounds} accuracy gained, paired, 95 %, {name}"))
    numbers = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    return split_tag("report") + paragraph(text) + f'<div class="tiles">{numbers}</div>' + paragraph(_checks(edit))


def _checks(edit: EditRecord) -> str:
    return (
        f"The direction's norm is {edit.norm_over_stream_norm:.2f} of the stream's (probe split). On completions of "
        f"the report split it tells long from short with AUROC {number(edit.auroc)}. Folded into the weights, the "
        f"edit changes no logit by more than {edit.fold_error:.1g} against the same edit at run time (64 "
        "completions of the probe split)."
    )


def _evidence(evidence: EvidenceRecord) -> str:
    layers = evidence.layers
    confounds = {name: [layer.confounds[name] for layer in layers] for name in layers[0].confounds}
    figure = evidence_figure(
        [layer.layer for layer in layers],
        [layer.auroc for layer in layers],
        null=[layer.null for layer in layers],
        random=[layer.random for layer in layers],
        confounds=confounds,
    )
    columns = ["layer", "AUROC", "shuffled labels", "random directions", "cosine of halves", "p", *confounds]
    rows = [
        [
            f"L{layer.layer}",
            number(layer.auroc),
            *(interval(bounds) for bounds in (layer.null, layer.random, layer.cosine)),
            number(layer.p),
            *(number(layer.confounds[name]) for name in confounds),
        ]
        for layer in layers
    ]
    text = (
        f"The direction at {evidence.site}, {_position(evidence.position)}: how well it tells "
        f"{evidence.n_long} long from {evidence.n_short} short completions that it was not estimated on. 0.5 is "
        "chance. A direction is worth something where its line leaves both bands, and the confounds' lines."
    )
    return (
        split_tag("probe, held-out half")
        + paragraph(text)
        + plot(figure)
        + told(on_evidence(evidence))
        + folded_away("The numbers", table(columns, rows))
    )


def _heads(heads: HeadsRecord) -> str:
    names = {
        "raw": "Raw: on short completions",
        "centred": "Centred: on short less on long completions",
    }
    plots = "".join(
        f"<div><h3>{name}</h3>{plot(heads_figure(getattr(heads, key), edited=heads.edited))}</div>"
        for key, name in names.items()
    )
    text = (
        f"What each head writes towards short thinking, {_position(heads.position)}, one cell a head: "
        "orange writes towards short, blue towards long. The edited heads are outlined."
    )
    scores = [
        [f"L{i}H{j}", number(raw), number(centred), "edited" if (i, j) in heads.edited else ""]
        for i, (above, below) in enumerate(zip(heads.raw, heads.centred, strict=True))
        for j, (raw, centred) in enumerate(zip(above, below, strict=True))
    ]
    numbers = folded_away("All heads", table(["head", "raw", "centred", ""], scores))
    return split_tag("probe") + paragraph(text) + f'<div class="pair">{plots}</div>' + told(on_heads(heads)) + numbers


def _sweep(sweep: SweepRecord) -> str:
    series = [
        sorted([sweep.plain, *doses], key=lambda dose: dose.strength) for doses in (sweep.direction, sweep.random)
    ]
    where = "All layers" if sweep.layer is None else f"Layer {sweep.layer} alone"
    text = (
        f"Strength times the layer's raw direction ({_position(sweep.position)}) is added to what attention writes, "
        f"at every token; {sweep.problems} problems, {sweep.draws} random directions of the same norm, 95 % "
        "intervals over problems. Strength 0 is the plain model."
    )
    columns = ["strength", "thinking tokens", "accuracy", "truncated", "random: tokens", "accuracy", "truncated"]
    rows = [[f"{a.strength:+g}", *_dose_cells(a), *_dose_cells(b)] for a, b in zip(*series, strict=True)]
    numbers = folded_away("The numbers", table(columns, rows))
    drawn = plot(sweep_figure(*series)) + told(on_sweep(sweep))
    return f"<h3>{where}</h3>" + split_tag("select") + paragraph(text) + drawn + numbers


def _dose_cells(dose: Dose) -> list[str]:
    return [number(dose.length, 2), number(dose.accuracy), share(dose.truncation)]


def _length(arms: ArmsRecord) -> str:
    points = [Point(arm, part.length, part.accuracy, part.interval, group) for group, part, arm in _parts(arms)]
    text = (
        f"Each arm on the same {arms.problems} problems, {arms.samples} sample each and more for controls of "
        "several draws. Bars are 95 % intervals. An arm that changes nothing lies on the plain model."
    )
    return split_tag("report") + paragraph(text) + plot(arms_figure(points)) + told(*on_arms(arms))


def _arms(arms: ArmsRecord) -> str:
    cuts = list(arms.report["plain"].overall.shortest)
    columns = ["arm", "problems", "n", "samples", "accuracy", "against plain", "thinking tokens", "truncated"]
    columns += [f"shortest {cut}: accuracy, tokens" for cut in cuts]
    rows = [
        [
            arm,
            group,
            part.n,
            part.samples,
            f"{number(part.accuracy)} {interval(part.interval)}",
            "" if arm == "plain" else signed(part.difference, part.difference_interval),
            number(part.length, 2),
            share(part.truncation),
            *(f"{number(rate)}, {number(length, 1)}" for rate, length in (part.shortest[cut] for cut in cuts)),
        ]
        for group, part, arm in _parts(arms)
    ]
    names = "".join(f"<li><b>{escape(arm)}</b>: {escape(ARMS[arm])}</li>" for arm in arms.report if arm in ARMS)
    selected = [
        [arm, s.n, number(s.accuracy), signed(s.difference, s.difference_interval), number(s.length, 2)]
        for arm, s in ((name, scores.overall) for name, scores in arms.selection.items())
    ]
    others = table(["setting", "problems", "accuracy", "against plain", "thinking tokens"], selected)
    text = "Paired with the plain model by problem; no choice has seen these problems."
    measured = f'<div id="arms-table">{table(columns, rows)}</div>'
    selection = folded_away("All settings, on the select split, each in its last round", split_tag("select") + others)
    return split_tag("report") + paragraph(text) + measured + f'<ul class="soft">{names}</ul>' + selection


def _provenance(provenance: ProvenanceRecord) -> str:
    rows = [
        [field.name, _text_of(getattr(provenance, field.name))]
        for field in fields(provenance)
        if field.name not in ("splits", "model")
    ]
    parts = [["model: " + name, _text_of(value)] for name, value in provenance.model.items()]
    splits = [["split: " + name, text] for name, text in provenance.splits.items()]
    text = "The three splits share no problem. Long and short completions are those of the probe split."
    return paragraph(text) + table(["what", "value"], [*parts, *splits, *rows], prose=True)


def _text_of(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text_of(item)}" for key, item in value.items())
    return "not known" if value in (None, "") else str(value)


def _groups(arms: ArmsRecord) -> tuple[str | None, ...]:
    return (None, arms.subgroup) if arms.subgroup else (None,)


def _parts(arms: ArmsRecord) -> Iterable[tuple[str, Score, str]]:
    """Group, score and name of every arm, overall and then on the subgroup."""
    for group in _groups(arms):
        for arm, scores in arms.report.items():
            yield group or "all", scores.on(group), arm


def _position(position: str) -> str:
    return POSITIONS[position].words if position in POSITIONS else position
