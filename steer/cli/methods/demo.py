"""`steer demo`: the main job on an embedded model, from start to end."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import probes.generation
import steer.methods
from steer.cli.dry import thinkedit_work
from steer.cli.methods.thinkedit import finish
from steer.cli.options import Json, Seed, free

if TYPE_CHECKING:
    from steer.methods.thinkedit import ThinkEditSetting


@dataclass(frozen=True)
class Demo:
    """How much of the main job is done on an embedded model, so that it takes minutes. `n` problems are reported on."""

    task: str
    n: int
    n_probe: int
    n_select: int
    draws: int
    n_sweep: int
    batch_size: int
    settings: "tuple[ThinkEditSetting, ...]"
    threads: int | None = None


def demos() -> dict[str, Demo]:
    """By model: of the small one all settings, with sweeps; of the large one, which takes longer, four settings."""
    of = steer.methods.thinkedit.ThinkEditSetting
    four = tuple(of(kind, place, "raw") for kind in ("project", "replace") for place in ("thinking", "first"))
    return {
        "organism": Demo("chains", 1500, 1000, 400, 5, 200, 256, steer.methods.thinkedit_run.grid(), threads=1),
        "reasoner": Demo("stories", 120, 200, 60, 2, 0, 64, four),
    }


def demo_(
    model: Annotated[str, typer.Argument(help="An embedded model: `organism`, or `reasoner`.")] = "organism",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="runs/demo-N, if left out.")] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", min=1, help="Problems to report on; the demo's own.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The main job on an embedded model: probe, derive, choose, edit, export, and compare with the controls.

    Completions are kept in OUTPUT.completions: a demo that was killed, started again, goes on where it stopped.
    """
    import torch
    import transformers

    if model not in demos():
        raise ValueError(f"There is no demo of {model!r}, but of {' and '.join(demos())}: see steer thinkedit.")
    demo = demos()[model]
    if demo.threads is not None:
        torch.set_num_threads(demo.threads)  # tiny matrices: more threads only wait for each other
    transformers.utils.logging.disable_progress_bar()
    folder = output or next(p for i in range(1, 1_000_000) if not (p := Path(f"runs/demo-{i}")).exists())
    free(folder)
    sizes: dict[str, Any] = {
        "n_probe": demo.n_probe, "n_select": demo.n_select, "n_report": n or demo.n, "samples": 1
    }  # fmt: skip
    work = thinkedit_work(demo.settings, n_sweep=demo.n_sweep, **sizes)
    with probes.generation.progress(work.completions, label="editing"):
        run = steer.methods.thinkedit_run.thinkedit(
            model, demo.task, settings=demo.settings, control_draws=demo.draws, batch_size=demo.batch_size,
            store=folder.with_name(f"{folder.name}.completions"), seed=seed, **sizes,
        )  # fmt: skip
        finish(run, folder, demo.n_sweep, demo.batch_size, as_json)
