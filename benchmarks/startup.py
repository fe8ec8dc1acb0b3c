"""What starting costs: processor time of new Pythons, which import or ask for help.

`import steer` is to cost at most 1 s beyond `import torch`, and `--help`, of `steer` and of each command, at most 1 s
in all. Beside them, what it costs to touch every public name of `steer` and `probes` once, most of which is
transformers' own model code. Median of 7 processes each, by the processor's clock, user and system; the first is not
counted.

    python benchmarks/startup.py
"""

import json
import resource
import subprocess
import sys

import numpy as np
import typer
from rich.console import Console

from probes.tables import Table
from steer.cli.main import app

ROUNDS, TARGET = 7, 1.0
NAMES = "import steer, probes; [getattr(m, n) for m in (steer, probes) for n in m.__all__]"


def main() -> None:
    helps = [["-m", "steer", *path, "--help"] for path in commands(typer.main.get_command(app))]
    torch, steer, names, top = (
        seconds(arguments)
        for arguments in (["-c", "import torch"], ["-c", "import torch, steer, probes"],
                          ["-c", f"import torch; {NAMES}"], helps[0])
    )  # fmt: skip
    slowest = max(seconds(arguments, rounds=2) for arguments in helps)
    facts = {
        "import torch": torch,
        "import steer, beyond torch": steer - torch,
        "every public name touched, beyond torch": names - torch,
        "steer --help": top,
        f"the slowest of {len(helps)} helps": slowest,
    }
    rows = tuple((name, f"{value:.2f}") for name, value in facts.items())
    Console(width=100).print(Table(("what", "seconds of the processor"), rows, "Start-up"))
    met = facts["import steer, beyond torch"] <= TARGET and max(top, slowest) <= TARGET
    print(json.dumps({**facts, "target": TARGET, "met": met}))


def commands(command: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all commands, the whole first."""
    inner = getattr(command, "commands", {})
    return [path, *(found for name, one in inner.items() for found in commands(one, (*path, name)))]


def seconds(arguments: list[str], rounds: int = ROUNDS) -> float:
    """The median over processes of user and system time, after one that is not counted."""
    spent = []
    for _ in range(rounds + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return float(np.median(spent[1:]))


if __name__ == "__main__":
    main()
