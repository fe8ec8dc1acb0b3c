"""`steer compare`: what a recipe does to a few prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import probes.generation
import steer.evaluation
import steer.recipes
from steer.cli.dry import Work, tell
from steer.cli.loading import model_of
from steer.cli.options import Delimit, DeviceMap, DryRun, Dtype, Json, Model, Seed, Temperature, console, end


def compare_(
    model: Model,
    recipe: Annotated[Path, typer.Option(help="A recipe folder.")],
    prompt: Annotated[list[str], typer.Option(help="What the user says; may be given several times.")],
    temperature: Temperature = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    dry_run: DryRun = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Plain and steered completions side by side, and what the recipe touched."""
    steered = steer.recipes.Recipe.load(recipe)
    loaded = model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    steered.check(loaded)
    sampling = probes.generation.Sampling.of(loaded, max_new_tokens=max_new_tokens, seed=seed)
    sampling = sampling if temperature is None else replace(sampling, temperature=temperature)
    work = Work(2 * len(prompt))
    if dry_run:
        tell(work, loaded, prompt, sampling, len(prompt), as_json)
        return
    with probes.generation.progress(work.completions, label="comparing"):
        found = steer.evaluation.compare(loaded, steered, prompt, sampling=sampling)
    console.print(found.table())
    fired = found.fired.table()
    facts = {
        "plain": [c.answer for c in found.plain],
        "steered": [c.answer for c in found.steered],
        "fired": [dict(zip(fired.columns, row, strict=True)) for row in fired.rows],
    }
    end(fired, facts, as_json)
