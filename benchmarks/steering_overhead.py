"""What steering costs while generating: seconds of greedy decoding with a recipe, over seconds without.

SmolLM2-135M-Instruct, batch 1 and 8, a fixed number of new tokens, one thread. Arms: plain; bare hooks that
add a vector in every block; ours, an Add at every layer's resid_post; the same scoped to the thinking (which every
new token is in: the prompt opens it); ours without its log of what was touched (to see what that costs); and the
neighbours that install beside us (the `peers` extra), adding the same vectors in all layers. A round runs every arm
once, in an order drawn anew; ratios are taken within rounds. All arms write the same tokens, which is checked: the
vectors are small.

    GOMP_SPINCOUNT=0 python benchmarks/steering_overhead.py [ROUNDS]
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from timing import in_words, ratio, timed
from torch import Tensor
from transformers import PreTrainedModel

from probes import attached, load
from probes.model import sites_in, tokenizer_of
from probes.tables import Table
from steer import Add, Recipe, applied
from steer.runtime import FireLog

ROUNDS, NEW_TOKENS, BATCHES = 20, 24, (1, 8)
PROMPT = "Explain in a few sentences why the sky is blue."
TARGETS = {"ours": 1.02, "ours, thinking": 1.02}
Write = Callable[[], Tensor]


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    model = load("smollm2", delimiters=("<|im_start|>assistant\n", " answer"))
    facts = {f"batch {batch}": measured(model, batch, rounds) for batch in BATCHES}
    print(json.dumps({"load_average": os.getloadavg(), **facts}))


def measured(model: PreTrainedModel, batch: int, rounds: int) -> dict:
    arms = arms_of(model, batch)
    tokens = {name: arm() for name, arm in arms.items()}
    differ = [name for name, found in tokens.items() if not torch.equal(found, tokens["plain"])]
    seconds = timed(arms, rounds)
    ratios = {
        name: {clock: ratio(found[name] / found["plain"]) for clock, found in seconds.items()}
        for name in arms
        if name != "plain"
    }
    rows = [(name, *map(in_words, clocks.values())) for name, clocks in ratios.items()]
    plain = float(np.median(seconds["cpu"]["plain"]))
    title = f"batch {batch}, {NEW_TOKENS} new tokens, {rounds} rounds; plain: {plain:.2f} CPU s; other tokens: {differ}"
    Console(width=140).print(Table(("arm", "wall clock [95 %]", "processor's clock [95 %]"), tuple(rows), title))
    met = {name: ratios[name]["cpu"][0] <= target for name, target in TARGETS.items()}
    return {"plain_seconds": plain, "ratios": ratios, "target_met": met, "other_tokens": differ}


def arms_of(model: PreTrainedModel, batch: int) -> dict[str, Write]:
    tokenizer = tokenizer_of(model)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"].repeat(batch, 1)
    numbers = torch.Generator().manual_seed(0)
    vectors = {site: 1e-3 * torch.randn(576, generator=numbers) for site in sites_in(model, "resid_post")}
    adds = [Add(site, vector) for site, vector in vectors.items()]
    everywhere, thinking = (Recipe.of(model, adds, scope=scope) for scope in ("all", "thinking"))
    write = partial(
        model.generate,
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )

    def ours(recipe: Recipe) -> Tensor:
        with applied(model, recipe):
            return write()

    def without_log(recipe: Recipe) -> Tensor:
        nothing = {"note": lambda *_: None, "end_pass": lambda *_: None}  # neither kept nor added up
        with patch.multiple(FireLog, **nothing), applied(model, recipe, must_fire=False):
            return write()

    def bare() -> Tensor:
        with ExitStack() as stack:
            for site, vector in vectors.items():
                stack.enter_context(attached(model, site, partial(torch.add, vector)))
            return write()

    arms: dict[str, Write] = {
        "plain": write,
        "bare hooks": bare,
        "ours": partial(ours, everywhere),
        "ours, thinking": partial(ours, thinking),
        "ours, without its log": partial(without_log, everywhere),
    }
    if find_spec("nnsight"):
        arms["nnsight"] = nnsight_arm(deepcopy(model), ids, list(vectors.values()))
    if find_spec("transformer_lens"):
        arms["transformer_lens"] = transformer_lens_arm(deepcopy(model), ids, vectors)
    return arms


def nnsight_arm(model: PreTrainedModel, ids: Tensor, vectors: list[Tensor]) -> Write:
    import nnsight

    traced = nnsight.TransformersModel(model, tokenizer=tokenizer_of(model), task="text-generation")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def write() -> Tensor:
        with traced.generate(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False) as tracer:
            with tracer.invoke(inputs):
                for _ in tracer.iter[:]:
                    for layer, vector in zip(traced.model.layers, vectors, strict=True):
                        layer.output = layer.output + vector
            with tracer.invoke():
                out = traced.generator.output.save()
        return out

    return write


def transformer_lens_arm(model: PreTrainedModel, ids: Tensor, vectors: dict) -> Write:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers("any", hf_model=model, tokenizer=tokenizer_of(model))
    hooks = [
        (site.transformer_lens, lambda x, hook, vector=vector: x + vector)  # noqa: ARG005
        for site, vector in vectors.items()
    ]

    @torch.no_grad()
    def write() -> Tensor:
        with bridge.hooks(fwd_hooks=hooks):
            return bridge.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, verbose=False, stop_at_eos=False)

    return write


if __name__ == "__main__":
    main()
