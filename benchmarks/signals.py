"""Signals along a chain, on both embedded models: which completion to trust, and when to stop.

    python benchmarks/signals.py PART [--model reasoner] [--n 300] [--samples 8] [--store FOLDER]

`text`: completions of *probe*, *select* and *report* problems, at temperature 0.7. `force`: the answer that each chain
would give at the end of each of its steps, and, of report problems, at its end. `read`: the signals of every report
chain. `table`: how well each tells right from wrong, within a length too, and what a confidence is worth. `select`:
choosing among samples. `exit`: stopping early; nothing of it was fitted on report problems. Each part keeps its work in
the store: a part that was killed, started again, goes on.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from probes import Completion, Sampling, Site, generate, load
from probes.activations import read_trajectories
from probes.directions import conformal_threshold, decided_at
from probes.directions.answer_probe import answer_probe, step_states
from probes.evidence import SIGNALS, auroc, calibration, read_signals, signal_table
from probes.generation import Forced, by_problem, forced_answers
from probes.model import n_layers
from probes.tables import Table
from probes.thinking import equations_hold, segments
from steer import task_named
from steer.decoding import (
    Budget,
    Converge,
    EarlyExit,
    EntropyExit,
    Prune,
    Samples,
    accept_early,
    acceptance_threshold,
    best_of,
    combined,
    cross_validated,
    early_path,
    majority,
    selected,
)
from steer.evaluation import interval_of_mean, pick_table, solve, standard_picks
from steer.tasks import answer_key, chain_holds, is_correct

HOW = {  # task, rules of steps, what an answer begins with, tokens a segment, check of a step, dtype
    "reasoner": ("stories", "seal", "\n\nThe answer is ", 10, equations_hold, torch.bfloat16),
    "organism": ("chains", "organism", "", 3, chain_holds, torch.float32),
}
SPLITS = {"probe": 1, "select": 1, "report": None}  # samples a problem; None: as many as asked for
AT_ONCE, STEP = 100, 2
LESS = {"cumulative": -1, "layer angle": -1}  # of which less should mean right
RISKS = (0.05, 0.1, 0.2, 0.3)
CHOICES = ("brevity", "log-probability", "margin", "net", "cumulative", "aligned")
console = Console(width=180)


class Work:
    """The model, its task, and the store of what was made with them."""

    def __init__(self, name: str, n: int, samples: int, store: Path) -> None:
        task, self.rules, self.suffix, self.segment, self.holds, dtype = HOW[name]
        self.name, self.n, self.samples, self.store = name, n, samples, store / name
        self.task, self.model = task_named(task), load(name, dtype=dtype)
        self.sampling = Sampling(temperature=0.7, max_new_tokens=self.task.max_new_tokens, seed=17)
        self.store.mkdir(parents=True, exist_ok=True)

    def problems(self, split: str) -> list:
        return self.task.sample(self.n, split)

    def completions(self, split: str) -> list[Completion]:
        problems = self.problems(split)
        return generate(
            self.model, [p.question for p in problems], ids=[p.id for p in problems], batch_size=100,
            samples=SPLITS[split] or self.samples, sampling=self.sampling, store=self.store / f"{split}.jsonl",
        )  # fmt: skip

    def firsts(self, split: str) -> list[Completion]:
        return [row[0] for row in by_problem(self.completions(split)).values()]

    def steps(self, completion: Completion) -> list[int]:
        return [segment.stop for segment in segments(self.model, completion, self.rules)]

    def forced(self, split: str) -> list[list[Forced]]:
        """Of the first completion of each problem, at the end of each step."""
        return self.kept(f"steps-{split}", self.firsts(split), self.steps)

    def at_end(self) -> list[list[Forced]]:
        """Of each report completion, at the end of its chain."""
        return self.kept(
            "end-report", self.completions("report"), lambda c: [] if c.span is None else [c.span.text_end]
        )

    def kept(
        self, name: str, items: Sequence[Completion], stops: Callable[[Completion], list[int]]
    ) -> list[list[Forced]]:
        path = self.store / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        done = [[Forced(**words) for words in json.loads(line)] for line in lines]
        with path.open("a") as file:
            for start in range(len(done), len(items), AT_ONCE):
                part = items[start : start + AT_ONCE]
                new = forced_answers(self.model, part, [stops(c) for c in part], suffix=self.suffix, max_new_tokens=8)
                file.writelines(json.dumps([asdict(forced) for forced in row]) + "\n" for row in new)
                file.flush()
                done += new
        return done

    def states(
        self, split: str, own: list[Completion], stops: list[list[int]], sites: list[Site]
    ) -> dict[Site, torch.Tensor]:
        """At the end of each step."""
        path = self.store / f"states-{split}.pt"
        if not path.exists():
            torch.save({str(s): x for s, x in step_states(self.model, own, stops, sites).items()}, path)
        return {Site.parse(name): x for name, x in torch.load(path, weights_only=True).items()}

    def signals(self) -> dict[str, np.ndarray]:
        """Of each report completion; and, after a few steps of its chain, net and cumulative change."""
        own, ends, path = self.completions("report"), self.at_end(), self.store / "signals.jsonl"
        done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        with path.open("a") as file:
            for start in range(len(done) * AT_ONCE, len(own), AT_ONCE):
                part = slice(start, start + AT_ONCE)
                done.append(self._read(own[part], [row[0] if row else None for row in ends[part]]))
                file.write(json.dumps(done[-1]) + "\n")
                file.flush()
        return {name: np.array([value for part in done for value in part[name]]) for name in done[0]}

    def _read(self, own: Sequence[Completion], forced: Sequence[Forced | None]) -> dict[str, list[float]]:
        chains = read_trajectories(self.model, own, segment=self.segment)  # read once, for what is below as well
        rest = [name for name in SIGNALS if name not in chains[0].scores()]
        found = read_signals(
            self.model, own, rest, segment=self.segment, rules=self.rules, holds=self.holds, forced=forced
        )
        for name in chains[0].scores():
            found[name] = np.array([LESS.get(name, 1) * chain.scores()[name] for chain in chains])
        for name in ("net", "cumulative"):
            found[f"{name} after {STEP}"] = np.array([LESS.get(name, 1) * chain.after(STEP)[name] for chain in chains])
        return {name: values.tolist() for name, values in found.items()}


def text(work: Work) -> dict:
    return {split: len(work.completions(split)) for split in SPLITS}


def force(work: Work) -> dict:
    return {**{split: sum(map(len, work.forced(split))) for split in SPLITS}, "ends": len(work.at_end())}


def read(work: Work) -> dict:
    return {name: int((~np.isnan(values)).sum()) for name, values in work.signals().items()}


def table(work: Work) -> dict:
    own, signals, gold = work.completions("report"), work.signals(), {p.id: p for p in work.problems("report")}
    correct = np.array([is_correct(c, gold[c.id], work.task.grader) for c in own])
    length = np.array([c.thinking_tokens for c in own])
    problems = [c.id for c in own]
    found = signal_table(signals, correct, problems, length)
    console.print(found.table())
    first = np.array([row[0].first if row else 0.0 for row in work.at_end()])
    agree = np.array([
        bool(row) and answer_key(replace(c, answer=row[0].answer, stop="eos"), work.task.grader)
        == answer_key(c, work.task.grader) for c, row in zip(own, work.at_end(), strict=True)
    ])  # fmt: skip
    sure = calibration(first, correct, problems)
    votes = Samples.of(own, work.problems("report"), work.task).votes
    share = (votes[:, :, None] == votes[:, None, :]).mean(2).reshape(-1)
    agreeing = calibration(share, correct, problems)
    console.print(sure.table(), agreeing.table())
    return {
        "right": float(correct.mean()), "thinking_tokens": float(length.mean()), "forced_is_own": float(agree.mean()),
        "auroc": {s.name: [round(s.auroc, 3), round(s.within_length, 3), round(s.within_problem, 3)]
                  for s in found.scores},
        "forced_confidence": {"ece": sure.ece, "chance": sure.ece_chance, "brier": sure.brier,
                              "reliability": sure.reliability, "resolution": sure.resolution},
        "agreement": {"ece": agreeing.ece, "chance": agreeing.ece_chance, "brier": agreeing.brier},
    }  # fmt: skip


def select(work: Work) -> dict:
    signals = work.signals()
    late = {name: signals[name] for name in CHOICES}
    whole = Samples.of(work.completions("report"), work.problems("report"), work.task, signals)
    samples = replace(whole, signals={name: whole.signals[name] for name in late})
    picks = standard_picks(samples)
    travels = ("net", "cumulative", "aligned")

    def fused(train: Samples, test: Samples) -> Samples:
        return test.with_signal("LT", combined(train, travels)(test))

    def lt_best(train: Samples, test: Samples):
        return best_of(fused(train, test), "LT")

    def lt_first(train: Samples, test: Samples):
        return accept_early(fused(train, test), "LT", acceptance_threshold(fused(train, train), "LT"))

    picks["best by LT-combined"] = cross_validated(samples, lt_best)
    picks["first past LT-combined"] = cross_validated(samples, lt_first)
    rng = np.random.default_rng(0)
    noise = samples.with_signal("noise", rng.random(samples.votes.shape))
    picks["best by noise"] = best_of(noise, "noise")
    picks["first past noise"] = cross_validated(
        noise, lambda train, test: accept_early(test, "noise", acceptance_threshold(train, "noise"))
    )
    at = (STEP + 1) * work.segment
    for name in ("net", "cumulative"):
        picks[f"path by {name}"] = early_path(whole, f"{name} after {STEP}", at)
    picks["path by noise"] = early_path(noise, "noise", at)
    found = pick_table(samples, picks)
    console.print(found.table())
    ks = {k: float(majority(samples.first(k)).correct.mean()) for k in (1, 2, 4, work.samples) if k <= work.samples}
    pruned = prune(work)
    return {"majority": ks, "picks": {s.name: [round(s.drawn, 2), round(s.tokens), round(s.accuracy, 3)]
                                      for s in found.scores}, "pruned": pruned}  # fmt: skip


def prune(work: Work) -> dict:
    """Early path selection for real, of fewer problems: what the model wrote."""
    few, many = work.problems("report")[:100], min(4, work.samples)
    control = Prune(samples=many, step=STEP, segment=work.segment)
    made = solve(work.model, few, sampling=work.sampling, samples=many, control=control,
                 store=work.store / "pruned.jsonl", grader=work.task.grader, batch_size=100)  # fmt: skip
    ids = {p.id: p for p in few}
    kept = selected(work.model, made, control)
    plain = [c for c in work.completions("report") if c.id in ids and c.sample < many]
    right = [is_correct(c, ids[c.id], work.task.grader) for c in kept]
    return {
        "problems": len(kept), "accuracy": float(np.mean(right)), "tokens": sum(len(c.ids) for c in made) / len(few),
        "unpruned_tokens": sum(len(c.ids) for c in plain) / len(few),
    }  # fmt: skip


def decided(work: Work, split: str) -> list[list[bool]]:
    grader = work.task.grader
    return [
        decided_at([answer_key(replace(c, answer=f.answer, stop="eos"), grader) for f in row], answer_key(c, grader))
        for c, row in zip(work.firsts(split), work.forced(split), strict=True)
    ]


def exit_(work: Work) -> dict:
    model, own = work.model, {split: work.firsts(split) for split in SPLITS}
    stops = {split: [work.steps(c) for c in own[split]] for split in SPLITS}
    labels = {split: decided(work, split) for split in SPLITS}
    layers = sorted({round(n_layers(model) * share) - 1 for share in (0.25, 0.5, 0.65, 0.8, 1.0)})
    sites = [Site(layer, "resid_post") for layer in layers]
    x = {split: work.states(split, own[split], stops[split], sites) for split in SPLITS}
    known = torch.tensor([label for row in labels["probe"] for label in row])
    half = sum(map(len, stops["probe"][: len(own["probe"]) // 2]))
    worth = {}
    for site in sites:  # chosen within the probe split
        scores = answer_probe(x["probe"][site][:half], known[:half], site)(x["probe"][site][half:])
        worth[str(site)] = auroc(scores[known[half:]], scores[~known[half:]])
    site = max(sites, key=lambda site: worth[str(site)])
    probe = answer_probe(x["probe"][site], known, site)
    scores = {split: list(probe(x[split][site]).split([len(own) for own in stops[split]])) for split in SPLITS}
    thresholds = {risk: conformal_threshold(scores["select"], labels["select"], risk) for risk in RISKS}
    gold = work.problems("report")
    right = [[is_correct(replace(c, answer=f.answer, stop="eos"), p, work.task.grader) for f in row]
             for c, p, row in zip(own["report"], gold, work.forced("report"), strict=True)]  # fmt: skip
    plain = [is_correct(c, p, work.task.grader) for c, p in zip(own["report"], gold, strict=True)]
    rows = []

    def simulate(name: str, fires: list[list[bool]], note: str = "") -> None:
        at = [row.index(True) if True in row else None for row in fires]
        correct = np.array([r[i] if i is not None else p for r, i, p in zip(right, at, plain, strict=True)], float)
        spent = [stop[i] - c.span.text_start + 1 if i is not None else c.thinking_tokens
                 for c, stop, i in zip(own["report"], stops["report"], at, strict=True)]  # fmt: skip
        wrong = np.mean([i is not None and not label[i] for label, i in zip(labels["report"], at, strict=True)])
        low, high = interval_of_mean(correct - np.array(plain, float))
        rows.append((name, "forced", float(correct.mean()), f"{correct.mean() - np.mean(plain):+.3f} [{low:+.3f}, "
                     f"{high:+.3f}]", float(np.mean(spent)), float(wrong), note))  # fmt: skip

    forced = work.forced("report")
    simulate("whole chain", [[False] * len(row) for row in forced])
    for risk, tau in thresholds.items():
        simulate(f"probe, risk {risk}", [(s > tau).tolist() for s in scores["report"]], f"threshold {tau:.2f}")
    for below in (0.05, 0.5):
        simulate(f"forced margin > {1 - below}", [[f.margin > 1 - below for f in row] for row in forced])
    for m in (2, 3):
        keys = [[answer_key(replace(c, answer=f.answer, stop="eos"), work.task.grader) for f in row]
                for c, row in zip(own["report"], forced, strict=True)]  # fmt: skip
        simulate(f"{m} equal forced answers", [[i + 1 >= m and len(set(k[i + 1 - m : i + 1])) == 1
                                                for i in range(len(k))] for k in keys])  # fmt: skip
    rng = np.random.default_rng(0)
    for risk in (0.1, 0.2):
        rate = np.mean([bool((s > thresholds[risk]).any()) for s in scores["report"]])
        places = [rng.integers(len(row)) if row and rng.random() < rate else -1 for row in forced]
        fires = [[i == place for i in range(len(row))] for place, row in zip(places, forced, strict=True)]
        simulate(f"random step, as often as risk {risk}", fires)
    arms = {f"EarlyExit, risk {r}": EarlyExit(probe, thresholds[r], work.rules) for r in (0.1, 0.2)
            if np.isfinite(thresholds[r])}  # fmt: skip
    means = sorted(c.thinking_tokens for c in own["report"])
    arms |= {f"Budget({k})": Budget(int(k)) for k in (means[len(means) // 2], means[3 * len(means) // 4])}
    arms |= {f"Converge({m})": Converge(m, every=1) for m in (2, 3)}
    arms |= {f"EntropyExit({b})": EntropyExit(b, work.rules) for b in (0.05, 0.3)}
    for name, control in arms.items():
        file = "".join(x if x.isalnum() else "-" for x in name)
        made = solve(model, gold, sampling=work.sampling, control=control, store=work.store / f"{file}.jsonl",
                     grader=work.task.grader, batch_size=100, label=name)  # fmt: skip
        correct = np.array([is_correct(c, p, work.task.grader) for c, p in zip(made, gold, strict=True)], float)
        low, high = interval_of_mean(correct - np.array(plain, float))
        stopped = np.mean([any(kind == "close" for kind, _ in c.events) for c in made])
        rows.append((name, "written", float(correct.mean()), f"{correct.mean() - np.mean(plain):+.3f} [{low:+.3f}, "
                     f"{high:+.3f}]", float(np.mean([c.thinking_tokens for c in made])), float("nan"),
                     f"stopped {stopped:.0%}"))  # fmt: skip
    console.print(Table(("rule", "answer", "accuracy", "against the whole chain [95 %]", "thinking tokens",
                         "stopped undecided", "note"), tuple(rows), f"Early exit, {len(gold)} problems"))  # fmt: skip
    return {"site": str(site), "auroc_by_site": worth, "steps": probe.n,
            "rules": {row[0]: [round(row[2], 3), round(row[4], 1), round(row[5], 3)] for row in rows}}  # fmt: skip


PARTS = {"text": text, "force": force, "read": read, "table": table, "select": select, "exit": exit_}


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
    seconds = round(time.monotonic() - began)
    print(json.dumps({"part": options.part, "model": options.model, "n": options.n, "seconds": seconds, **facts}))


if __name__ == "__main__":
    main()
