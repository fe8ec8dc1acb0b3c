"""Which heads and layers carry the brief habit of the reasoner, found by patching, beside ThinkEdit's ranking.

A marked prompt opens with words such as "In short: ", and the model hardly thinks. Its unmarked twin opens with neutral
words of as many tokens. The metric is how much likelier the first token of a long opening is than that of a brief one,
in log-probability summed over the first tokens of each; which they are, and which neutral words have no effect, is told
by completions and problems of the probe split. What of the unmarked run, put into the marked one at all positions,
brings its metric back (0: nothing, 1: all of it)? Every head, and what attention and MLP of each layer add, on problems
of the report split; by a gradient on more of them. ThinkEdit ranks heads by what they write towards short thinking.

    GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1 python benchmarks/brief_habit.py [PROBLEMS] [PROBLEMS BY GRADIENT] [PICTURE]
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from probes import load, read_completions
from probes.figures import heads_figure, save_figure
from probes.generation import Completion
from probes.lens import token_ids
from probes.model import n_heads, n_layers, tokenizer_of
from probes.tables import Table
from steer import task_named
from steer.causal import attribution_patched, patched
from steer.evaluation import interval_of_mean
from steer.methods.thinkedit import LengthReading, LengthSplit
from steer.tasks.stories import CUES

KEPT = Path(__file__).parents[1] / "notebooks" / "stories" / "probe.jsonl"
NEUTRAL = (
    "A story: ", "My story: ", "One story: ", "Here is one: ", "This is it: ", "A new story: ", "Here is a story: ",
    "This is my own story: ", "Here is a small story: ", "This is a story for you: ", "A story of one day: ",
)  # fmt: skip
TOP = 16  # heads that ThinkEdit would edit: 6 %


def main() -> None:
    exact, quick = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 6), (2, 24)))
    torch.set_num_threads(1)
    model, task, began = load("reasoner", dtype=torch.float32), task_named("stories"), time.perf_counter()
    completions = read_completions(KEPT)
    split = LengthSplit.by_quantile(completions, share=0.2)
    long, brief = openings(split.long), openings(split.short)
    metric = Opening(sorted(long - brief), sorted(brief - long))
    plain = [p.question for p in task.sample(300, "probe") if p.subgroup is None][:12]
    twins = neutral_of(model, plain, metric)
    asked = [p.question for p in task.sample(400, "report") if p.subgroup is None]
    pairs = [
        (twin + text, cue + text) for text, (cue, twin) in zip(asked, list(twins.items()) * len(asked), strict=False)
    ]
    heads = [f"L{layer}H{head}.z" for layer in range(n_layers(model)) for head in range(n_heads(model))]
    layers = [f"L{layer}.{name}" for layer in range(n_layers(model)) for name in ("attn_out", "mlp_out")]
    parts = [*heads, *layers]
    found, fast, ends = [], [], []
    for i, (clean, marked) in enumerate(pairs[:quick]):
        quickly = attribution_patched(model, clean, marked, parts, metric=metric)
        fast.append(quickly.effect[:, 0].numpy())
        if i < exact:
            one = patched(model, clean, marked, parts, metric=metric)
            found.append(one.effect[:, 0].numpy())
            ends.append((one.clean, one.corrupted))
            print(f"problem {i + 1} of {exact}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    effects, gradients = np.stack(found), np.stack(fast)
    readings = {p: LengthReading.of(model, split, position=p) for p in ("thinking", "first")}
    rankings = {
        f"{position}, {ranking}": reading.scores(ranking).scores.flatten().numpy()
        for position, reading in readings.items() for ranking in ("raw", "centred")
    }  # fmt: skip
    mean = effects.mean(0)
    told = {
        "problems": exact, "by gradient": quick, "neutral words": twins, "tokens": metric.words(model),
        "metric unmarked, marked": np.mean(ends, axis=0).tolist(),
        "heads": ranked(effects[:, : len(heads)], heads), "layers": ranked(effects[:, len(heads) :], layers),
        "gradient": faithful(gradients[:exact], effects),
        "ThinkEdit": {name: against(mean[: len(heads)], own) for name, own in rankings.items()},
        "effects of heads": mean[: len(heads)].round(4).tolist(),
        "effects of layers": mean[len(heads) :].round(4).tolist(),
        "load_average": os.getloadavg(), "seconds": round(time.perf_counter() - began),
    }  # fmt: skip
    show(told)
    if len(sys.argv) > 3:
        draw(mean[: len(heads)].reshape(n_layers(model), -1), readings["first"].scores("centred").top(TOP), sys.argv[3])
    print(json.dumps(told))


class Opening:
    """How much likelier a first token of these is than one of those."""

    def __init__(self, long: list[int], brief: list[int]) -> None:
        self.long, self.brief = long, brief

    def __call__(self, logits: Tensor) -> Tensor:
        return logits[self.long].logsumexp(0) - logits[self.brief].logsumexp(0)

    def words(self, model: PreTrainedModel) -> list[list[str]]:
        tokenizer = tokenizer_of(model)
        return [[tokenizer.decode([token]) for token in ids] for ids in (self.long, self.brief)]


def openings(completions: tuple[Completion, ...]) -> set[int]:
    """First tokens of at least a tenth of them."""
    counts = Counter(completion.ids[0] for completion in completions)
    return {token for token, count in counts.items() if count >= 0.1 * len(completions)}


def neutral_of(model: PreTrainedModel, plain: list[str], metric: Opening) -> dict[str, str]:
    """For each cue, the words of as many tokens that move the metric least from that of no words."""
    tokenizer = tokenizer_of(model)
    sizes = {words: len(tokenizer.encode(words + "Ana", add_special_tokens=False)) for words in (*CUES, *NEUTRAL)}
    bare, found = measured(model, plain, "", metric), {}
    for cue in CUES:
        same = [words for words in NEUTRAL if sizes[words] == sizes[cue]]
        moved = {words: abs(measured(model, plain, words, metric) - bare) for words in same}
        if moved:
            found[cue] = min(moved, key=moved.__getitem__)
    return found


@torch.no_grad()
def measured(model: PreTrainedModel, plain: list[str], words: str, metric: Opening) -> float:
    rows = [torch.tensor([token_ids(model, words + text)]) for text in plain]
    return float(np.mean([float(metric(model(ids).logits[0, -1].float())) for ids in rows]))


def ranked(effects: np.ndarray, names: list[str], k: int = 12) -> list[tuple]:
    """The largest means, with their intervals over problems."""
    order = np.argsort(-effects.mean(0))[:k]
    return [(names[i], float(effects[:, i].mean()), *interval_of_mean(effects[:, i])) for i in order]


def faithful(gradients: np.ndarray, effects: np.ndarray) -> dict[str, float]:
    rank = stats.spearmanr(gradients.mean(0), effects.mean(0)).statistic
    return {"Spearman": float(rank), "Pearson": float(np.corrcoef(gradients.mean(0), effects.mean(0))[0, 1])}


def against(effects: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Of all heads: do those that write towards short thinking carry the habit? And of the first sixteen of each."""
    rank = stats.spearmanr(effects, scores)
    first, second = (set(np.argsort(-values)[:TOP].tolist()) for values in (effects, scores))
    shared = len(first & second)
    chance = stats.hypergeom.sf(shared - 1, len(effects), TOP, TOP)
    carried = float(effects[sorted(second)].sum() / effects[sorted(first)].sum())
    return {
        "Spearman": float(rank.statistic), "p": float(rank.pvalue), "shared of 16": shared, "p of that": float(chance),
        "effect of theirs over that of the best": carried,
    }  # fmt: skip


def draw(effects: np.ndarray, edited: list, path: str) -> None:
    """Heads by what they bring back, those that ThinkEdit ranks highest outlined."""
    title = "What each head brings back of long thinking; outlined: ThinkEdit's sixteen (first position, centred)"
    save_figure(heads_figure(effects.tolist(), edited=edited, title=title), path, width=760, scale=1)


def show(told: dict) -> None:
    console = Console(width=120)
    for kind in ("heads", "layers"):
        console.print(
            Table(("part", "effect", "low", "high"), tuple(told[kind]), f"{kind}, {told['problems']} problems")
        )
    columns = ("ranking", *next(iter(told["ThinkEdit"].values())))
    rows = tuple((name, *row.values()) for name, row in told["ThinkEdit"].items())
    console.print(Table(columns, rows, "Against ThinkEdit's"))


if __name__ == "__main__":
    main()
