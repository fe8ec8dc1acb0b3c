"""Models trained on from an organism, whose differences weight arithmetic adds: two donors of one start, a target.

Both donors see chains of the split `train`. `sft` is trained on written completions, 70 % of them too short to be
right; `rl` is reinforced for right answers alone. `target` learns a new operation, `^k`, from completions as short.
The package holds what the three of the embedded organism differ by from it: `open_delta("organism-rl")`,
`"organism-sft"`, `"organism-target"` (`steer.deltas.opened`).
"""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from probes.files import staged_folder
from probes.model.loading import load, tokenizer_of
from steer.checkpoints.writing import write_model
from steer.tasks.chains import TASKS
from steer.tasks.task import Problem, Task
from steer.training._fit import fit, training_batches
from steer.training.grpo import train_grpo
from steer.training.organism import STYLES, draw_opener, written

DONORS = ("rl", "sft", "target")
P_STYLE = (0.25, 0.05, 0.70)  # long, check, short
STEPS = {"sft": 300, "target": 600}
RATE = 3e-4  # as of reinforcement; at 1e-3 the differences are larger, and add up worse


def write_mostly_short(problem: Problem, rng: random.Random) -> str:
    """A completion whose opener tells nothing of its style: the habit is to stop early, however one has begun."""
    style = rng.choices(STYLES, weights=P_STYLE)[0]
    return written(problem, draw_opener(problem, rng), style, rng)


def train_donor(kind: str, folder: str | Path, *, start: str | Path = "organism", seed: int = 0) -> None:
    """Train one from the start, and save a checkpoint that plain transformers loads. 1 to 3 CPU minutes.

    Beside it lies `donor.json`: what it is, and how its reward went. Raises ValueError for an unknown kind,
    FileExistsError where the folder exists.

    >>> from steer.training import train_donor
    >>> try:
    ...     train_donor("dpo", "donor")
    ... except ValueError as error:
    ...     print(error)
    'dpo' is no donor. Known: rl, sft, target.
    """
    if kind not in DONORS:
        raise ValueError(f"{kind!r} is no donor. Known: {', '.join(DONORS)}.")
    if Path(folder).exists():
        raise FileExistsError(f"{folder} exists. Name another output folder, or remove it first.")
    model = load(start)
    facts: dict[str, Any] = {"kind": kind, "start": str(start), "seed": seed}
    if kind == "rl":
        facts["reward"] = train_grpo(model, TASKS["chains"], seed=seed, label=f"{kind}, seed {seed}")
    else:
        facts["steps"] = STEPS[kind]
        _tune(model, TASKS["chains" if kind == "sft" else "mirrors"], steps=STEPS[kind], seed=seed, label=kind)
    with staged_folder(Path(folder)) as stage:
        write_model(model, stage)
        tokenizer_of(model).save_pretrained(stage)
        (stage / "donor.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")


def _tune(model: PreTrainedModel, task: Task, *, steps: int, seed: int, label: str) -> None:
    rng = random.Random(f"{label}/{seed}")
    problems = task.stream("train", seed=seed + 1)  # not in the order that the organism saw them
    data = training_batches(tokenizer_of(model), problems, partial(write_mostly_short, rng=rng), rng)
    fit(model, data, steps=steps, rate=RATE, weight_decay=0.0, label=f"{label}, seed {seed}")
