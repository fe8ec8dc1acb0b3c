"""`steer parity`: is a recipe the same in every way that the model is run?"""

from pathlib import Path
from typing import Annotated

import typer

import steer.engines
import steer.engines.vllm
import steer.recipes
import steer.tasks
from steer.cli.loading import model_of
from steer.cli.options import Count, Delimit, DeviceMap, Dtype, Json, MaxNewTokens, Model, TaskName, end


def parity_(
    model: Model,
    recipe: Annotated[Path, typer.Argument(help="A recipe folder.")],
    task: TaskName = "chains",
    n: Count = 8,
    max_new_tokens: MaxNewTokens = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="In logits; that of the model's dtype, if left out.")
    ] = None,
    vllm: Annotated[bool, typer.Option(help="Also in vLLM, where it is installed.")] = True,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    as_json: Json = False,
) -> None:
    """Greedy answers under a recipe, one by one, batched, with other caches and in vLLM, compared token by token.

    It fails where one differs at a token of which the model was sure.
    """
    source, steered = steer.tasks.task_named(task), steer.recipes.Recipe.load(recipe)
    loaded = model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    prompts = [problem.question for problem in source.sample(n, "report")]
    engines = steer.engines
    found = engines.parity(
        loaded,
        steered,
        prompts,
        max_new_tokens=max_new_tokens or source.max_new_tokens,
        tolerance=tolerance,
        more=engines.vllm.vllm_ways() if vllm else None,
    )
    table = found.table()
    ways = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    end(table, {"holds": found.holds, "tolerance": found.tolerance, "ways": ways}, as_json)
    if found.differing:
        raise ValueError(
            f"{', '.join(found.differing)}: an answer differs from that of one prompt at a time where the model is "
            f"surer than {found.tolerance:g}, or there is none. Do not serve this recipe there, or give --tolerance."
        )
