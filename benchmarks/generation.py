"""What rows that leave a batch save: `probes.generate` beside `model.generate` of transformers, in the same run.

    python benchmarks/generation.py [--n 256] [--dtype float32] [--model reasoner --task stories]

The same problems, temperature .7, batches of 64 sorted by length, one thread, seconds of the processor. transformers
computes every row until the longest of its batch has ended: `waste` is rows computed over tokens needed, and the target
a speed-up of .8 times that. On the organism the target is not to be slower.
"""

import argparse
import json
import time

import torch
from transformers import set_seed

from probes import Sampling, generate, load
from probes.model import tokenizer_of
from probes.model.tokens import encode_prompt
from steer import task_named


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--n", type=int, default=256)
    words.add_argument("--batch-size", type=int, default=64)
    words.add_argument("--dtype", default="float32")
    words.add_argument("--model", default="reasoner")
    words.add_argument("--task", default="stories")
    options = words.parse_args()
    torch.set_num_threads(1)
    model, task = load(options.model, dtype=getattr(torch, options.dtype)), task_named(options.task)
    sampling = Sampling.of(model, max_new_tokens=task.max_new_tokens)
    questions = [problem.question for problem in task.sample(options.n, "report")]
    generate(model, questions[:2], sampling=Sampling(max_new_tokens=4))
    began = time.process_time()
    ours = sum(len(c.ids) for c in generate(model, questions, sampling=sampling, batch_size=options.batch_size))
    between = time.process_time()
    rows, needed = by_transformers(model, questions, sampling, options.batch_size)
    ended = time.process_time()
    speed, plain = ours / (between - began), needed / (ended - between)
    print(json.dumps({
        "model": options.model, "dtype": options.dtype, "n": options.n, "tokens": [ours, needed],
        "processor seconds": [round(between - began, 1), round(ended - between, 1)],
        "tokens a second": [round(speed, 1), round(plain, 1)], "waste": round(rows / needed, 2),
        "speed-up": round(speed / plain, 2), "target": round(0.8 * rows / needed, 2),
    }))  # fmt: skip


@torch.no_grad()
def by_transformers(model: torch.nn.Module, questions: list[str], sampling: Sampling, size: int) -> tuple[int, int]:
    """Rows computed one by one at each step, and tokens up to each row's end."""
    tokenizer = tokenizer_of(model)
    end, pad = model.generation_config.eos_token_id, tokenizer.pad_token_id
    prompts = sorted((encode_prompt(tokenizer, question) for question in questions), key=len, reverse=True)
    rows = needed = 0
    set_seed(0)
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        new = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=sampling.temperature, top_k=0, top_p=1.0,
            max_new_tokens=sampling.max_new_tokens, pad_token_id=pad,
        )[:, width:]  # fmt: skip
        rows += new.numel()
        ended = (new == end).long().cumsum(1)
        needed += int((ended.cumsum(1) <= 1).sum())
    return rows, needed


if __name__ == "__main__":
    main()
