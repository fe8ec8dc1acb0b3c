"""`steer direction`: from two classes of texts to a direction."""

from pathlib import Path
from typing import Annotated

import typer

import probes.directions
import probes.model
import probes.thinking
from steer.cli.loading import model_of
from steer.cli.options import (
    Delimit,
    DeviceMap,
    Dtype,
    Json,
    Model,
    console,
    end,
    free,
)


def direction_(
    model: Model,
    positive: Annotated[Path, typer.Option(help="JSONL: completions of ours, or lines of {text}.")],
    negative: Annotated[Path, typer.Option(help="The other class.")],
    site: Annotated[str, typer.Option(help="Such as L2.resid_post.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A safetensors file; must not exist.")],
    last: Annotated[bool, typer.Option("--last", help="Read texts at their last token, not their mean.")] = False,
    keep_sinks: Annotated[bool, typer.Option("--keep-sinks", help="Average attention sinks, too.")] = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    as_json: Json = False,
) -> None:
    """The direction from one class of texts or completions to another, at a site (difference in means)."""
    where = probes.model.Site.parse(site)
    free(output, "file")
    loaded = model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    above, below = (
        probes.thinking.text_spans(loaded, path, position="text_last" if last else "text")
        for path in (positive, negative)
    )
    found = probes.directions.difference_in_means(loaded, above, below, [where], keep_sinks=keep_sinks)[where]
    found.save(output)
    console.print(found.tokens(loaded, 8))
    facts = {"site": str(where), "norm": found.norm, "norm_over_stream_norm": found.norm / found.stream_norm}
    end(found.table(), facts, as_json)
