"""What folding costs in memory: a random Llama of about 2 GB in bfloat16, 4 % of whose heads are ablated.

    python benchmarks/folding.py

Each share is of the bytes that the weights take: what the folded model holds of its own, and the peak of the process.
"""

import json
import random
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from probes import Site, load
from probes.model import tokenizer_of
from steer import Ablate, Recipe, folded

SHARE = 0.04


def peak() -> int:
    """The most memory that the process has held, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = load(LlamaForCausalLM(config), tokenizer=tokenizer_of(load("organism")))
    every = [(layer, head) for layer in range(22) for head in range(32)]
    heads = random.Random(0).sample(every, round(SHARE * len(every)))
    vector = torch.randn(2048)
    recipe = Recipe.of(model, [Ablate(Site(layer, "result", head), vector) for layer, head in heads])
    size = sum(p.nbytes for p in model.parameters())
    before, began = peak(), time.monotonic()
    twin = folded(model, recipe)
    seconds, grown = time.monotonic() - began, peak() - before
    shared = {p.data_ptr() for p in model.parameters()}
    own = sum(p.nbytes for p in twin.parameters() if p.data_ptr() not in shared)
    layers = len({layer for layer, _ in heads})
    print(f"{size / 1e9:.2f} GB, {len(heads)} heads in {layers} layers, folded in {seconds:.2f} s")
    print(json.dumps({"gigabytes": size / 1e9, "own": own / size, "peak": grown / size, "seconds": seconds}))


if __name__ == "__main__":
    main()
