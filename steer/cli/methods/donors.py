"""`steer donors`: the models whose differences weight arithmetic adds, trained from an organism."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from probes.tables import Table
from steer.cli.options import Json, end
from steer.training.donors import KINDS, train_donor


def donors_(
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder; what it holds is not trained again.")],
    start: Annotated[str, typer.Option(help="An organism: a folder, or the embedded one.")] = "organism",
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Train two donors and a target from one organism, as the shipped ones were. About 6 minutes on one core."""
    torch.set_num_threads(1)
    for kind in KINDS:
        if not (output / kind).exists():
            train_donor(kind, output / kind, start=start, seed=seed)
    rows = tuple((kind, str(output / kind)) for kind in KINDS)
    end(Table(("Donors", start), rows), dict(rows), as_json)
