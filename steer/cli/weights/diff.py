"""`steer diff`: the tensors that differ between two checkpoints."""

import steer.checkpoints
from steer.cli.loading import check_place
from steer.cli.options import Json, end


def diff_(a: str, b: str, as_json: Json = False) -> None:
    """Every tensor that differs between two checkpoints: by how much, and in how many dimensions."""
    for name in (a, b):
        check_place(name)
    table = steer.checkpoints.diff(a, b).table()
    end(table, {"tensors": [dict(zip(table.columns, row, strict=True)) for row in table.rows]}, as_json)
