"""Latents on the embedded reasoner: an autoencoder trained on what it writes, which latents mark reasoning, and what
steering with them does.

    python benchmarks/latents.py PART [--n 200] [--gammas 1 2] [--layer 15] [--store FOLDER]

`text`: completions of problems of the *train* split, at the model's own temperature. `train`: a TopK autoencoder of the
residual stream on them, and what it explains of completions of the *select* split. `scores`: ReasonScore over
those (Galichin et al. 2025), and the verdicts of both controls. `steer`: the three latents of the highest score,
clamped to gamma times their largest activation, each beside latents at random that are active as often, on *report*
problems that nothing above saw. `tune`: SAE-Tuning in outline. Each part keeps its work in the store: a part that was
killed, started again, goes on.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from probes import Completion, Sampling, Span, generate, load
from probes.model import encode_prompt, tokenizer_of
from probes.saes import (
    SAETraining,
    SparseAutoencoder,
    check_sae,
    latent_usage,
    load_sae,
    phase_contrast,
    reason_score,
    save_sae,
    top_contexts,
    train_sae,
    verdicts,
)  # fmt: skip
from steer import Recipe, SetLatents, evaluate, task_named
from steer.training import SAETuning, recovered_loss, trigger_texts, tune_with_sae

TEXTS, HELD_OUT, D_SAE, TOKENS = 2_500, 300, 3_072, 600_000
CUES = ("Wait", "Alternatively", "Hmm", "But", "So", "Let me", "Therefore", "Maybe")
BEST = 3
console = Console(width=150)


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("part", choices=PARTS)
    words.add_argument("--n", type=int, default=200)
    words.add_argument("--layer", type=int, default=15)
    words.add_argument("--gammas", type=float, nargs="+", default=[1.0, 2.0])
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--store", type=Path, default=Path("runs/latents"))
    options = words.parse_args()
    torch.set_num_threads(options.threads)
    options.store.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    facts = PARTS[options.part](options)
    print(
        json.dumps({"part": options.part, "layer": options.layer, "seconds": round(time.monotonic() - began), **facts})
    )


def completions(options: argparse.Namespace, split: str, n: int) -> list[Completion]:
    """Written in bfloat16, which is faster where the processor has it, and read in float32."""
    model, task = load("reasoner", dtype=torch.bfloat16), task_named("stories")
    problems = task.sample(n, split)
    sampling = Sampling(temperature=0.7, max_new_tokens=task.max_new_tokens, seed=11)
    return generate(
        model, [p.question for p in problems], ids=[p.id for p in problems], sampling=sampling, batch_size=100,
        store=options.store / f"{split}.jsonl",
    )  # fmt: skip


def whole(written: Sequence[Completion]) -> list[Span]:
    return [Span(tuple(c.all_ids), 0, len(c.all_ids)) for c in written]


def text(options: argparse.Namespace) -> dict:
    parts = {split: completions(options, split, n) for split, n in (("train", TEXTS), ("select", HELD_OUT))}
    return {split: {"texts": len(part), "tokens": sum(len(c.all_ids) for c in part)} for split, part in parts.items()}


def train(options: argparse.Namespace) -> dict:
    spans = whole(completions(options, "train", TEXTS))
    model, site = load("reasoner"), f"L{options.layer}.resid_post"
    how = SAETraining(d_sae=D_SAE, tokens=TOKENS, k=32, batch_size=1_024)
    began = time.monotonic()
    sae = train_sae(model, spans, site, how, store=options.store / f"training-L{options.layer}")
    seconds = time.monotonic() - began
    if not trained(options).exists():
        save_sae(sae, trained(options), model="reasoner")
    held_out = whole(completions(options, "select", HELD_OUT))
    fit = check_sae(model, load_sae(trained(options)), held_out)
    recovered = recovered_loss(model, sae, held_out[:100])
    console.print(fit.table(), recovered.table())
    return {
        "training_seconds": round(seconds),
        "explained": fit.declared.variance,
        "l0": fit.declared.l0,
        "alive": fit.declared.alive,
        "neighbours": {str(row.site): row.variance for row in fit.rows[1:]},
        "cross_entropy": {"plain": recovered.plain, "spliced": recovered.spliced, "ablated": recovered.ablated},
        "recovered": recovered.recovered,
    }


def trained(options: argparse.Namespace) -> Path:
    return options.store / f"L{options.layer}"


def scores(options: argparse.Namespace) -> dict:
    model, sae = load("reasoner"), load_sae(trained(options))
    written = [c for c in completions(options, "select", HELD_OUT) if c.span is not None]
    found = reason_score(model, sae, whole(written))
    top = found.top(20)
    thoughts = [c.thinking for c in written]
    prompts = [p.question for p in task_named("stories").sample(HELD_OUT, "select")]
    told = verdicts(model, sae, top, thoughts, prompts, cues=CUES)
    phases = phase_contrast(model, sae, written, "thinking", "prompt")
    console.print(found.table(), told.table(), phases.table(10))
    kinds = [told.verdict(latent) for latent in top]
    return {
        "tokens": found.n_tokens,
        "in_windows": found.n_marked,
        "words_present": len(found.words),
        "declared": len(found.declared()),
        "top": top,
        "score": [round(float(found.score[i]), 5) for i in top],
        "verdict": kinds,
        "by_cue": [round(float(x), 3) for x in told.by_cue],
        "without_cues": [round(float(x), 3) for x in told.without_cues],
        "verdicts": {kind: kinds.count(kind) for kind in ("word", "phase", "both", "neither")},
        "declared_by_phase": len(phases.declared()),
        "contexts": contexts(model, sae, written[:100], top[:BEST]),
    }


def contexts(model, sae: SparseAutoencoder, written: Sequence[Completion], latents: Sequence[int]) -> dict:
    """Where each fires most, in words."""
    found = top_contexts(model, sae, latents, whole(written), count=4, around=(8, 4))
    return {i: [context.marked(tokenizer_of(model)) for context in own] for i, own in found.items()}


def steer(options: argparse.Namespace) -> dict:
    reader, sae = load("reasoner"), load_sae(trained(options))
    written = whole([c for c in completions(options, "select", HELD_OUT) if c.span is not None])
    usage = latent_usage(reader, sae, written)
    best = reason_score(reader, sae, written).top(BEST)
    nulls = usage.like(best, seed=0)
    model, task = load("reasoner", dtype=torch.bfloat16), task_named("stories")

    def clamped(latent: int, gamma: float) -> Recipe:
        return Recipe.of(model, [SetLatents.of(sae, {latent: gamma * float(usage.largest[latent])})], method="clamp")

    arms = {}
    for gamma in options.gammas:
        for latent, null in zip(best, nulls, strict=True):
            arms[f"latent {latent}, gamma {gamma:g}"] = clamped(latent, gamma)
            arms[f"random for {latent}, gamma {gamma:g}"] = [clamped(null, gamma)]
    problems = task.sample(options.n, "report")
    sampling = Sampling(temperature=0.7, max_new_tokens=task.max_new_tokens)
    told = evaluate(
        model, task, problems, arms, sampling=sampling, batch_size=100, store=options.store / f"steer-L{options.layer}"
    )
    console.print(told.table())
    return {
        "best": best,
        "largest": {i: float(usage.largest[i]) for i in best},
        "frequency": {i: float(usage.frequency[i]) for i in best},
        "random": nulls,
        "evaluation": told.to_dict(),
    }


def tune(options: argparse.Namespace) -> dict:
    """SAE-Tuning in outline: which layers learn, how the divergence goes in 30 steps, merged beside attached. No claim
    about accuracy, which takes a GPU."""
    model, sae = load("reasoner"), load_sae(trained(options))
    problems = task_named("stories").sample(400, "train")
    ids = torch.tensor([problems_ids(model, problems[0])])
    facts = {}
    for through in (True, False):
        how = SAETuning(rate=1e-4, epochs=1, length=128, through=through)
        tuned = tune_with_sae(model, sae, trigger_texts(problems[:30]), how)
        losses = [loss / how.length for loss in tuned.losses[:30]]
        moved = {
            int(name.split("layers.")[1].split(".")[0])
            for name, parameter in tuned.model.named_parameters()
            if "lora_B" in name and bool(parameter.detach().any())
        }
        with torch.no_grad():
            gap = float((tuned.merged()(ids).logits - tuned.model(ids).logits).abs().max())
        facts["through" if through else "as released"] = {
            "steps": len(losses),
            "kl_per_token, first and last five": [sum(losses[:5]) / 5, sum(losses[-5:]) / 5],
            "layers_that_learned": sorted(moved),
            "merged_against_attached": gap,
        }
    return facts


def problems_ids(model, problem) -> list[int]:
    return encode_prompt(tokenizer_of(model), problem.question)


PARTS = {"text": text, "train": train, "scores": scores, "steer": steer, "tune": tune}

if __name__ == "__main__":
    main()
