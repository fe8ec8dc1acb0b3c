"""`steer compare`: what a recipe does to a few prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import probes.generation
import probes.model
import steer.evaluation
import steer.recipes
from steer.cli.options import Delimit, DeviceMap, Dtype, Json, Model, console, end


def compare_(
    model: Model,
    recipe: Annotated[Path, typer.Option(help="A recipe folder.")],
    prompt: Annotated[list[str], typer.Option(help="What the user says; may be given several times.")],
    temperature: Annotated[float | None, typer.Option(help="The model's own, if left out; 0 is greedy.")] = None,
    max_new_tokens: int = 256,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Plain and steered completions side by side, and what the recipe touched."""
    loaded = probes.model.load(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    sampling = probes.generation.Sampling.of(loaded, max_new_tokens=max_new_tokens, seed=seed)
    sampling = sampling if temperature is None else replace(sampling, temperature=temperature)
    found = steer.evaluation.compare(loaded, steer.recipes.Recipe.load(recipe), prompt, sampling=sampling)
    console.print(found.table())
    fired = found.fired.table()
    facts = {
        "plain": [c.answer for c in found.plain],
        "steered": [c.answer for c in found.steered],
        "fired": [dict(zip(fired.columns, row, strict=True)) for row in fired.rows],
    }
    end(fired, facts, as_json)
