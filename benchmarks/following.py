"""What following chains while they are written costs: seconds of greedy decoding, over seconds without.

SmolLM2-135M-Instruct, batch 1 and 8, one thread, every token thought. Arms decode side by side, as in
`steering_overhead.py`: plain; `following`, in segments of 500 tokens as published, and of 10, so that segments end.

    GOMP_SPINCOUNT=0 python benchmarks/following.py [ROUNDS]
"""

import json
import os
import sys
from contextlib import nullcontext
from copy import deepcopy

import numpy as np
import torch
from rich.console import Console
from steering_overhead import NEW_TOKENS, prompts, side_by_side
from timing import in_words, ratio

from probes import load
from probes.activations import following
from probes.tables import Table

ROUNDS, BATCHES, TARGET = 20, (1, 8), 1.05
ARMS = {
    "plain": lambda _: nullcontext(),
    "following": following,
    "segments of 10": lambda model: following(model, segment=10),
}


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    model = load("smollm2", delimiters=("<|im_start|>assistant\n", " answer"))
    facts, rows = {}, []
    for batch in BATCHES:
        ids, copies = prompts(model, batch), [deepcopy(model) for _ in ARMS]
        side_by_side(ARMS, copies, ids)  # not counted
        runs = [side_by_side(ARMS, copies[n % 3 :] + copies[: n % 3], ids, n)[0] for n in range(rounds)]
        seconds = {name: np.stack([run[name] for run in runs]) for name in ARMS}
        for name in list(ARMS)[1:]:
            steps = ratio(seconds[name][:, 1:].sum(1) / seconds["plain"][:, 1:].sum(1))
            whole = ratio(seconds[name].sum(1) / seconds["plain"].sum(1))
            facts[f"{name}, batch {batch}"] = {"steps": steps, "all": whole, "met": whole[0] <= TARGET}
            rows.append((name, batch, in_words(steps), in_words(whole)))
    columns = ("arm", "batch", "steps [95 %]", "with the prompt [95 %]")
    Console(width=140).print(Table(columns, tuple(rows), f"{NEW_TOKENS} new tokens, {rounds} rounds, target {TARGET}"))
    print(json.dumps({"load_average": os.getloadavg(), "target": TARGET, **facts}))


if __name__ == "__main__":
    main()
