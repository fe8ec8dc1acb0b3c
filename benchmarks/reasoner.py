"""Methods measured on the embedded reasoner, a command each: stories it was trained on, with a cue to be brief.

    python benchmarks/reasoner.py METHOD [--n 300] [--dtype bfloat16] [--device cuda] [--store FOLDER]

METHOD is a function of `reasoner_methods.py` or `reasoner_battery.py`, which says what it measures. Problems of three
splits: *probe* gives directions, *select* chooses, *report* is what is told. Differences in accuracy are paired by
problem; null draws share the report problems out among them. Completions are kept in the store: a command that was
killed, started again, goes on.
"""

import argparse
import json
import time
from pathlib import Path

import reasoner_battery
import reasoner_methods

METHODS = (
    "plain", "thinkedit", "alpha", "length", "efficient", "seals", "behaviour", "representation",
    "representation_organism", "vector", "dial", "decoding", "prompts", "closing", "loop", "cue",
    "off_target", "held_out",
)  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("method", choices=METHODS)
    words.add_argument("--n", type=int, default=300)
    words.add_argument("--batch-size", type=int, default=64)
    words.add_argument("--device", default="cpu")
    words.add_argument("--dtype", default="bfloat16")
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--store", type=Path, default=Path("runs/reasoner"))
    options = words.parse_args()
    began = time.monotonic()
    measure = getattr(reasoner_methods, options.method, None) or getattr(reasoner_battery, options.method)
    facts = measure(options)
    about = {"method": options.method, "n": options.n, "dtype": options.dtype, "device": options.device}
    print(json.dumps({**about, "seconds": round(time.monotonic() - began), **facts}))


if __name__ == "__main__":
    main()
