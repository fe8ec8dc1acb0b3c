"""`steer report`: a run as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

import steer.report
from probes.tables import Table
from steer.cli.options import Json, end, writable_file


def report_(
    run: Annotated[Path, typer.Argument(help="A folder that `steer demo` or `steer thinkedit` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="An HTML file.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """What a run measured, as one HTML file that needs no network."""
    writable_file(output)
    path = steer.report.write_report(run, output)
    end(Table(("Report", ""), (("file", str(path)),)), {"report": str(path)}, as_json)
