"""`steer show`: what a file of ours holds."""

from pathlib import Path
from typing import Any

import probes.directions
import probes.generation
import steer.recipes
from probes.tables import Table
from steer.cli.options import Json, console, end


def show_(path: Path, as_json: Json = False) -> None:
    """What a file of ours holds: a direction, a recipe, completions, or an exported checkpoint."""
    if (path / "recipe" / "recipe.yaml").is_file():
        path = path / "recipe"
    facts: dict[str, Any] = {}
    if path.is_dir():
        recipe = steer.recipes.Recipe.load(path)
        table = recipe.table()
        if recipe.births:
            console.print(recipe.births_table())
        facts["births"] = [birth.to_dict() for birth in recipe.births]
    elif path.suffix == ".jsonl":
        rows = [(c.id, c.thinking_tokens, c.stop, c.answer) for c in probes.generation.read_completions(path)]
        table = Table(("completion", "thinking tokens", "stop", "answer"), tuple(rows), str(path))
    elif path.is_file():
        table = probes.directions.Direction.load(path).table()
    else:
        raise FileNotFoundError(f"{path} does not exist.")
    end(table, {"rows": [list(row) for row in table.rows], **facts}, as_json)
