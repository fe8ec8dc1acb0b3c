"""A run as files: the exported checkpoint with its record and report in it, and the report alone."""

import json
from pathlib import Path

from probes.files import inside, reading, staged_file
from probes.texts import read_json
from steer.checkpoints._diff import Difference
from steer.methods.thinkedit_run import ThinkEditRun
from steer.report.record import RunRecord
from steer.report.thinkedit import render


def save(run: ThinkEditRun, folder: str | Path, record: RunRecord | None = None) -> Difference:
    """Export a run (`ThinkEditRun.export`) with its record, `run.json`, and the report of that, `report.html`.

    Without `record`, one without sweeps is made. Raises as the export does.

    >>> from steer import thinkedit
    >>> from steer.methods.thinkedit import PUBLISHED
    >>> from steer.report import save
    >>> run = thinkedit("organism", settings=[PUBLISHED], n_probe=40, n_select=2, n_report=12, control_draws=1)
    >>> changes = save(run, "edited")
    >>> [tensor.name for tensor in changes.tensors]
    ['model.layers.0.self_attn.o_proj.weight']
    """
    record = record or RunRecord.of(run, n=0)
    text = json.dumps(record.to_dict(), allow_nan=False) + "\n"
    return run.export(folder, extras={"run.json": text, "report.html": render(record)})


def write_report(run_folder: str | Path, output: str | Path) -> Path:
    """Read `run.json` in an exported folder and write the report.

    Raises FileNotFoundError where there is none, ValueError where it is not a record of a run.

    >>> from steer.report import write_report
    >>> try:
    ...     write_report("nowhere", "report.html")  # of a folder that `save` wrote it gives the page's path
    ... except FileNotFoundError as error:
    ...     print(error)
    nowhere holds no run.json: give the folder of an exported run.
    """
    source = Path(run_folder) / "run.json"
    if not source.is_file():
        raise FileNotFoundError(f"{run_folder} holds no run.json: give the folder of an exported run.")
    values = read_json(inside(Path(run_folder), source.name), "record of a run")
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds no keys: it is not a record of a run.")
    with reading(source, "record of a run"):
        text = render(values)
    with staged_file(Path(output)) as stage:
        stage.write_text(text, encoding="utf-8")
    return Path(output)
