"""Signals along a chain, on both embedded models: which completion to trust, and when to stop.

    python benchmarks/signals.py PART [--model reasoner] [--n 300] [--samples 8] [--store FOLDER]

`text`: completions of *probe*, *select* and *report* problems, at temperature 0.7. `force`: the answer that each chain
would give at the end of each of its steps, and, of report problems, at its end. `read`: the signals of every report
chain. `table`: how well each tells right from wrong, within a length too. `select`: choosing among samples. `exit`:
stopping early. Each part keeps its work in the store: a part that was killed, started again, goes on.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from probes import Completion, Sampling, generate, load
from probes.generation import Forced, by_problem, forced_answers
from probes.thinking import segments
from steer import task_named

HOW = {  # task, rules of steps, what an answer begins with, tokens a segment, dtype
    "reasoner": ("stories", "seal", "\n\nThe answer is ", 10, torch.bfloat16),
    "organism": ("chains", "organism", "", 3, torch.float32),
}
SPLITS = {"probe": 1, "select": 1, "report": None}  # samples a problem; None: as many as asked for
AT_ONCE = 100


class Work:
    """The model, its task, and the store of what was made with them."""

    def __init__(self, name: str, n: int, samples: int, store: Path) -> None:
        task, self.rules, self.suffix, self.segment, dtype = HOW[name]
        self.name, self.n, self.samples, self.store = name, n, samples, store / name
        self.task, self.model = task_named(task), load(name, dtype=dtype)
        self.sampling = Sampling(temperature=0.7, max_new_tokens=self.task.max_new_tokens, seed=17)
        self.store.mkdir(parents=True, exist_ok=True)

    def completions(self, split: str) -> list[Completion]:
        problems = self.task.sample(self.n, split)
        return generate(
            self.model, [p.question for p in problems], ids=[p.id for p in problems], batch_size=100,
            samples=SPLITS[split] or self.samples, sampling=self.sampling, store=self.store / f"{split}.jsonl",
        )  # fmt: skip

    def steps(self, completion: Completion) -> list[int]:
        return [segment.stop for segment in segments(self.model, completion, self.rules)]

    def forced(self, split: str) -> list[list[Forced]]:
        """Of each completion of a split, at the end of each step; of report problems, of their first sample."""
        own = [row[0] for row in by_problem(self.completions(split)).values()]
        return self.kept(f"steps-{split}", own, lambda part: forced_answers(
            self.model, part, [self.steps(c) for c in part], suffix=self.suffix, max_new_tokens=8))  # fmt: skip

    def at_end(self) -> list[list[Forced]]:
        """Of each report completion, at the end of its chain."""
        own = [c for c in self.completions("report") if c.span is not None]
        return self.kept("end-report", own, lambda part: forced_answers(
            self.model, part, [[c.span.text_end] for c in part], suffix=self.suffix, max_new_tokens=8))  # fmt: skip

    def kept(
        self, name: str, items: Sequence[Completion], make: Callable[[Sequence[Completion]], list]
    ) -> list[list[Forced]]:
        path = self.store / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        done = [[Forced(**words) for words in json.loads(line)] for line in lines]
        with path.open("a") as file:
            for start in range(len(done), len(items), AT_ONCE):
                new = make(items[start : start + AT_ONCE])
                file.writelines(json.dumps([asdict(forced) for forced in row]) + "\n" for row in new)
                file.flush()
                done += new
        return done


def text(work: Work) -> dict:
    return {split: len(work.completions(split)) for split in SPLITS}


def force(work: Work) -> dict:
    return {**{split: sum(map(len, work.forced(split))) for split in SPLITS}, "ends": len(work.at_end())}


PARTS = {"text": text, "force": force}


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("part", choices=PARTS)
    words.add_argument("--model", choices=HOW, default="reasoner")
    words.add_argument("--n", type=int, default=300)
    words.add_argument("--samples", type=int, default=8)
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--store", type=Path, default=Path("runs/signals"))
    options = words.parse_args()
    torch.set_num_threads(options.threads)
    began = time.monotonic()
    facts = PARTS[options.part](Work(options.model, options.n, options.samples, options.store))
    print(
        json.dumps(
            {
                "part": options.part,
                "model": options.model,
                "n": options.n,
                "seconds": round(time.monotonic() - began),
                **facts,
            }
        )
    )


if __name__ == "__main__":
    main()
