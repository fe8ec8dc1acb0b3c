"""`steer organism`, `steer donors`, `steer train-reasoner`: the embedded models, made anew."""

from pathlib import Path
from typing import Annotated

import typer

import steer.training
from probes.tables import Table
from steer.cli.loading import check_source
from steer.cli.options import Json, Output, Seed, end, free, writable


def donors_(
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder; what it holds is not trained again.")],
    start: Annotated[str, typer.Option(help="An organism: a folder, or the embedded one.")] = "organism",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train two donors and a target from one organism, as the shipped ones were. About 6 minutes on one core."""
    import torch

    check_source(start)
    writable(output)
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    for kind in steer.training.DONORS:
        if not (output / kind).exists():
            steer.training.train_donor(kind, output / kind, start=start, seed=seed)
    rows = tuple((kind, str(output / kind)) for kind in steer.training.DONORS)
    end(Table(("Donors", start), rows), dict(rows), as_json)


def organism_(
    output: Output,
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 2000,
    as_json: Json = False,
) -> None:
    """Train the embedded model from scratch, as the shipped one was. About 5 minutes on one core."""
    import torch

    free(output)
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    steer.training.train(output, seed=seed, steps=steps)
    rows = (("steps", steps), ("seed", seed), ("output", str(output)))
    end(Table(("Trained", "organism"), rows), dict(rows), as_json)


def train_reasoner_(
    output: Output,
    device: Annotated[str, typer.Option(help="Of torch; on a CPU it would take days.")] = "cuda",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train the embedded reasoner's three adapters. About six minutes on a large GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here: name another with --device.")
    free(output)
    rewards = steer.training.train_reasoner(output, device=device, seed=seed)
    rows = tuple((part, str(output / part)) for part in ("think", "rl", "target"))
    shown = (*rows, ("right answers, first and last", f"{rewards[0]:.2f}, {rewards[-1]:.2f}"))
    end(Table(("Trained", "reasoner"), shown), {**dict(rows), "rewards": rewards}, as_json)
