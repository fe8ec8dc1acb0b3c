"""Every arm of a run, on the report split and on the selection split, with what it scored."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from probes.fields import from_plain, keys_of, plain
from probes.files import check_keys
from steer.evaluation.evaluation import Evaluation, Score
from steer.evaluation.selection import Selection
from steer.methods.thinkedit_run import ThinkEditRun


@dataclass(frozen=True)
class ArmRecord:
    """What an arm scored on all problems, and on the marked ones where the task marks some."""

    overall: Score
    subgroup: Score | None = None

    def on(self, group: str | None) -> Score:
        """The score of all problems for None, else that of the marked ones. Raises ValueError where none are marked."""
        if group is None:
            return self.overall
        if self.subgroup is None:
            raise ValueError(f"This arm has no score of {group!r} problems.")
        return self.subgroup


@dataclass(frozen=True)
class ArmsRecord:
    """Arms by name. `subgroup` names the marked problems; `problems` and `samples` are those of the report split.

    Of the selection each arm's score is that of its last round."""

    subgroup: str | None
    problems: int
    samples: int
    report: Mapping[str, ArmRecord]
    selection: Mapping[str, ArmRecord]

    @classmethod
    def of(cls, run: ThinkEditRun) -> "ArmsRecord":
        group = next((group for group in run.report.groups() if group), None)
        report, selection = (_scores(evaluation, group) for evaluation in (run.report, run.selection))
        return cls(group, len(run.report.problems), run.report.score("plain").samples, report, selection)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: the score of the marked problems lies in its arm's, under their name."""
        parts = {"report": self.report, "selection": self.selection}
        scores = {
            part: {name: self._scores_of(arm) for name, arm in arms.items()} for part, arms in parts.items()
        }  # fmt: skip
        return {"subgroup": self.subgroup, "problems": self.problems, "samples": self.samples, **scores}

    def _scores_of(self, arm: ArmRecord) -> dict[str, Any]:
        marked = {} if self.subgroup is None or arm.subgroup is None else {self.subgroup: plain(arm.subgroup)}
        return {**plain(arm.overall), **marked}

    @classmethod
    def from_dict(cls, values: object, where: str) -> "ArmsRecord":
        """Raises ValueError for an arm that is missing, and for unknown or missing keys, by name."""
        rows = keys_of(values, where)
        check_keys(rows, [field.name for field in fields(cls)], where)
        group = rows["subgroup"]
        parts = {part: _read_arms(part, rows[part], group) for part in ("report", "selection")}
        return cls(group, rows["problems"], rows["samples"], **parts)


def _scores(found: Evaluation | Selection, group: str | None) -> dict[str, ArmRecord]:
    records = {}
    for arm in found.arms:
        problems = (found.last(arm) if isinstance(found, Selection) else found).problems
        marked = group is not None and any(problem.subgroup == group for problem in problems)  # few may hold none
        records[arm] = ArmRecord(found.score(arm), found.score(arm, group) if marked else None)
    return records


def _read_arms(part: str, values: object, group: str | None) -> dict[str, ArmRecord]:
    arms = keys_of(values, f"The part {part!r} of the arms")
    for arm in ("plain", "edited") if part == "report" else ("plain",):
        if arm not in arms:
            raise ValueError(f"The record's {part} has no arm {arm!r}.")
    return {name: _read_arm(f"The arm {name!r} of the record's {part}", score, group) for name, score in arms.items()}


def _read_arm(where: str, values: object, group: str | None) -> ArmRecord:
    rows = keys_of(values, where)
    if group is None or group not in rows:
        return ArmRecord(from_plain(Score, rows, where))
    check_keys(rows, [*(field.name for field in fields(Score)), group], where)
    overall = {key: value for key, value in rows.items() if key != group}
    return ArmRecord(from_plain(Score, overall, where), from_plain(Score, rows[group], f"{where}, {group},"))
