"""SAE-Tuning (Wang et al. 2025) on the organism in full: a LoRA trained around an autoencoder of it, on questions and
answers without a trace, beside plain fine-tuning of the same LoRA on the same text, and no tuning.

Both variants: gradients through the autoencoder, and none, as in the released code. Rates: the paper's, 1e-6, and one
that moves the model, which the accuracy of the first variant on problems of the *select* split chooses among two.
Accuracy and thinking tokens on problems of the *report* split that nothing above saw, paired by problem.

    python benchmarks/sae_tuning.py [--n 600] [--texts 2000] [--seeds 3]
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from transformers import PreTrainedModel

from probes import Sampling, load
from probes.model import decode, encode_prompt, tokenizer_of
from probes.saes import load_sae
from steer import evaluate, task_named
from steer.tasks import Problem
from steer.training import SAETuning, tune_with_sae
from steer.training.sae_tuning import _adapted, packed

RATES, PUBLISHED = (1e-4, 1e-3), 1e-6


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--n", type=int, default=600)
    words.add_argument("--texts", type=int, default=2_000)
    words.add_argument("--seeds", type=int, default=3)
    options = words.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    model, sae, task = load("organism"), load_sae("organism-L1"), task_named("chains")
    texts = written(model, task.sample(options.texts, "train"))
    how = SAETuning(rank=8, alpha=32, length=128)
    chosen = max(RATES, key=lambda rate: accuracy(tune_with_sae(model, sae, texts, replace(how, rate=rate)).merged()))
    arms, divergence = {}, {}
    for name, rate in (("published rate", PUBLISHED), ("chosen rate", chosen)):
        for through in (True, False):
            draws = [
                tune_with_sae(model, sae, texts, replace(how, rate=rate, through=through, seed=seed))
                for seed in range(options.seeds)
            ]
            arm = f"{name}, {'through' if through else 'as released'}"
            arms[arm] = [tuned.merged() for tuned in draws]
            n = len(draws[0].losses) // 8
            divergence[arm] = [sum(part) / n / how.length for part in (draws[0].losses[:n], draws[0].losses[-n:])]
        arms[f"{name}, fine-tuned"] = [
            fine_tuned(model, texts, replace(how, rate=rate, seed=seed)) for seed in range(options.seeds)
        ]
    sampling = Sampling(temperature=0.7, max_new_tokens=task.max_new_tokens)
    told = evaluate(model, task, task.sample(options.n, "report"), arms, sampling=sampling, batch_size=200)
    Console(width=140).print(told.table())
    facts = {"chosen_rate": chosen, "texts": len(texts), "kl_per_token, first and last eighth": divergence}
    print(json.dumps({**facts, "seconds": round(time.monotonic() - began), "evaluation": told.to_dict()}))


def written(model: PreTrainedModel, problems: Sequence[Problem]) -> list[str]:
    """Question, and the answer where the thinking would stand, in the model's own delimiters."""
    tokenizer = tokenizer_of(model)
    return [
        f"{decode(tokenizer, encode_prompt(tokenizer, p.question))} <think> {p.answer} </think> {p.answer}"
        for p in problems
    ]


def accuracy(model: PreTrainedModel) -> float:
    task = task_named("chains")
    sampling = Sampling(temperature=0.7, max_new_tokens=task.max_new_tokens)
    return (
        evaluate(model, task, task.sample(300, "select"), {}, sampling=sampling, batch_size=300).score("plain").accuracy
    )


def fine_tuned(model: PreTrainedModel, texts: Sequence[str], how: SAETuning) -> PreTrainedModel:
    """The same adapter, on cross-entropy over the same tokens."""
    from probes.model.quantised import merge_adapters

    torch.manual_seed(how.seed)
    twin = _adapted(model, how)
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=how.rate)
    twin.train()
    for _ in range(how.epochs):
        for row in packed(tokenizer_of(model), texts, how.length):
            ids = row[None]
            (how.length * twin(input_ids=ids, labels=ids).loss).backward()  # a sum over positions, as the other loss is
            torch.nn.utils.clip_grad_norm_(trained, how.clip)
            optimizer.step()
            optimizer.zero_grad()
    merge_adapters(twin.eval())
    return twin


if __name__ == "__main__":
    main()
