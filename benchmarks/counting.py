"""What counting experts costs while generating: seconds with `probes.activations.experts.counting` open, over seconds
without.

The organism (4 sparse layers of 8 experts, a decode step of a few milliseconds: any cost shows) and a random Qwen3-MoE
of 16 layers with 64 experts, top 8; batch 1 and 32, a fixed number of new tokens, greedy, one thread. All token classes
are counted, and RICE's markers. A round runs both arms once, in an order drawn anew; ratios are taken within rounds.
Both arms write the same tokens, which is checked. Memory: the bytes of the counts, after few tokens and after many;
beside them the choices of a bounded number of passes are held back, and counted at once.

    GOMP_SPINCOUNT=0 python benchmarks/counting.py [ROUNDS]
"""

import json
import os
import sys
from functools import partial

import numpy as np
import torch
from rich.console import Console
from timing import in_words, ratio, timed
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from probes import load
from probes.activations import counting
from probes.model import tokenizer_of
from probes.tables import Table
from steer.methods.rice import signed_markers

ROUNDS, BATCHES, TARGET = 20, (1, 32), 1.05
NEW_TOKENS = {"organism": 96, "random": 24}


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    facts = {name: {f"batch {batch}": measured(name, batch, rounds) for batch in BATCHES} for name in NEW_TOKENS}
    print(json.dumps({"load_average": os.getloadavg(), **facts}))


def measured(name: str, batch: int, rounds: int) -> dict:
    model = build(name)
    write = partial(generated, model, batch, NEW_TOKENS[name])

    def counted() -> Tensor:
        with counting(model, tuple(signed_markers(model))):
            return write()

    assert torch.equal(write(), counted()), "Counting changed what was written."
    seconds = timed({"plain": write, "counted": counted}, rounds)
    ratios = {clock: ratio(found["counted"] / found["plain"]) for clock, found in seconds.items()}
    plain = float(np.median(seconds["cpu"]["plain"]))
    title = f"{name}, batch {batch}, {NEW_TOKENS[name]} new tokens, {rounds} rounds; plain: {plain:.2f} CPU s"
    columns = ("arm", "wall clock [95 %]", "processor's clock [95 %]")
    Console(width=140).print(Table(columns, (("counted", *map(in_words, ratios.values())),), title))
    kept = {tokens: kept_bytes(model, tokens) for tokens in (8, 64)}
    return {"plain_seconds": plain, "ratios": ratios, "target_met": ratios["cpu"][0] <= TARGET, "kept_bytes": kept}


def generated(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    ids = (
        tokenizer_of(model)
        .apply_chat_template(
            [{"role": "user", "content": "a 3 b +4 c *7"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        .repeat(batch, 1)
    )
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip


def kept_bytes(model: PreTrainedModel, tokens: int) -> int:
    with counting(model, tuple(signed_markers(model))) as counts:
        generated(model, 1, tokens)
    return sum(tensor.numel() * tensor.element_size() for tensor in (counts.counts, counts.tokens))


def build(name: str) -> PreTrainedModel:
    if name == "organism":
        return load(name)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=69, hidden_size=512, moe_intermediate_size=256, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, num_experts=64, num_experts_per_tok=8, norm_topk_prob=True,
    )  # fmt: skip
    return load(Qwen3MoeForCausalLM(config), tokenizer=tokenizer_of(load("organism")))


if __name__ == "__main__":
    main()
