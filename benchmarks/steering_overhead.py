"""What steering costs while generating: seconds of greedy decoding with a recipe, over seconds without.

SmolLM2-135M-Instruct, batch 1 and 8, a fixed number of new tokens, one thread. Arms: plain; bare hooks that
add a vector in every block; ours, an Add at every layer's resid_post, with its log of what was touched; the same scoped
to the thinking (which every new token is in: the prompt opens it); ours without its log (to see what that costs).
The arms decode side by side, each on a copy of the model with a cache of its own: of every token all arms make one
step, in an order drawn anew, so that what slows the machine for a second slows all of them; copies are turned round by
round. A round begins with opening the recipe and reading the prompt, which are told apart. All arms write the same
tokens, which is checked: the vectors are small.

The neighbours that install beside us (the `peers` extra) add the same vectors in all layers, and are timed by whole
runs of `generate`.

    GOMP_SPINCOUNT=0 python benchmarks/steering_overhead.py [ROUNDS]
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
Steered = Callable[[PreTrainedModel], AbstractContextManager[object]]


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    model = load("smollm2", delimiters=("<|im_start|>assistant\n", " answer"))
    facts = {f"batch {batch}": measured(model, batch, rounds) for batch in BATCHES}
    print(json.dumps({"load_average": os.getloadavg(), **facts}))


def measured(model: PreTrainedModel, batch: int, rounds: int) -> dict:
    ids = prompts(model, batch)
    numbers = torch.Generator().manual_seed(0)
    vectors = {site: 1e-3 * torch.randn(576, generator=numbers) for site in sites_in(model, "resid_post")}
    arms = arms_of(model, vectors)
    copies = [deepcopy(model) for _ in arms]  # turned round by round: where its weights lie makes a model fast or slow
    side_by_side(arms, copies, ids)  # not counted
    turned = (copies[seed % len(arms) :] + copies[: seed % len(arms)] for seed in range(rounds))
    runs = [side_by_side(arms, those, ids, seed) for seed, those in enumerate(turned)]
    tokens = runs[0][1]
    differ = [name for name, found in tokens.items() if not torch.equal(found, tokens["plain"])]
    seconds = {name: np.stack([run[0][name] for run in runs]) for name in arms}  # [round, 1 + steps]
    steps = {name: found[:, 1:].sum(1) for name, found in seconds.items()}
    facts = {
        name: {
            "steps": ratio(steps[name] / steps["plain"]),
            "all": ratio(found.sum(1) / seconds["plain"].sum(1)),
            "opening and prompt, ms": float(1e3 * np.median(found[:, 0] - seconds["plain"][:, 0])),
            "a step, ms": float(1e3 * np.median(steps[name] - steps["plain"]) / (NEW_TOKENS - 1)),
        }
        for name, found in seconds.items()
        if name != "plain"
    }
    rows = [
        (name, in_words(f["steps"]), in_words(f["all"]), f"{f['opening and prompt, ms']:.1f}", f"{f['a step, ms']:.2f}")
        for name, f in facts.items()
    ]
    plain = float(1e3 * np.median(steps["plain"]) / (NEW_TOKENS - 1))
    title = (
        f"batch {batch}, {NEW_TOKENS} new tokens, {rounds} rounds; a plain step: {plain:.1f} ms; other tokens: {differ}"
    )
    columns = ("arm", "steps [95 %]", "with the opening [95 %]", "opening, + ms", "a step, + ms")
    Console(width=140).print(Table(columns, tuple(rows), title))
    met = {name: facts[name]["steps"][0] <= target for name, target in TARGETS.items()}
    peers = neighbours(model, ids, vectors, rounds)
    return {"plain_step_ms": plain, "ratios": facts, "target_met": met, "other_tokens": differ, "peers": peers}


def prompts(model: PreTrainedModel, batch: int) -> Tensor:
    chat = [{"role": "user", "content": PROMPT}]
    encode = tokenizer_of(model).apply_chat_template
    return encode(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"].repeat(batch, 1)


def arms_of(model: PreTrainedModel, vectors: dict) -> dict[str, Steered]:
    adds = [Add(site, vector) for site, vector in vectors.items()]
    everywhere, thinking = (Recipe.of(model, adds, scope=scope) for scope in ("all", "thinking"))

    @contextmanager
    def without_log(model: PreTrainedModel) -> Iterator[None]:
        with ExitStack() as stack:
            with patch.object(FireLog, "note", lambda *_: None):  # nothing kept
                log = stack.enter_context(applied(model, everywhere, must_fire=False))
            log.end_pass = lambda: None  # nor added up
            yield

    @contextmanager
    def bare(model: PreTrainedModel) -> Iterator[None]:
        with ExitStack() as stack:
            for site, vector in vectors.items():
                stack.enter_context(attached(model, site, partial(torch.add, vector)))
            yield

    return {
        "plain": lambda _: nullcontext(),
        "bare hooks": bare,
        "ours": lambda model: applied(model, everywhere),
        "ours, thinking": lambda model: applied(model, thinking),
        "ours, without its log": without_log,
    }


def written(model: PreTrainedModel, steered: Steered, ids: Tensor) -> Iterator[Tensor]:
    """Greedy decoding, token by token."""
    with steered(model):
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        for _ in range(NEW_TOKENS - 1):
            token = out.logits[:, -1:].argmax(-1)
            yield token
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        yield out.logits[:, -1:].argmax(-1)


@torch.no_grad()
def side_by_side(
    arms: dict[str, Steered], copies: list[PreTrainedModel], ids: Tensor, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    """The processor's seconds of every arm for each token, and what it wrote."""
    rng = random.Random(seed)
    runs = {name: written(copy, arms[name], ids) for name, copy in zip(arms, copies, strict=True)}
    seconds = {name: np.zeros(NEW_TOKENS) for name in arms}
    tokens: dict[str, list[Tensor]] = {name: [] for name in arms}
    for step in range(NEW_TOKENS):
        for name in rng.sample(list(arms), len(arms)):
            before = time.process_time()
            tokens[name].append(next(runs[name]))
            seconds[name][step] += time.process_time() - before
    for name, run in runs.items():  # the last adding up of the log belongs to the last step
        before = time.process_time()
        assert next(run, None) is None
        seconds[name][-1] += time.process_time() - before
    return seconds, {name: torch.cat(found, dim=1) for name, found in tokens.items()}


def neighbours(model: PreTrainedModel, ids: Tensor, vectors: dict, rounds: int) -> dict:
    arms = {"plain": partial(generated, model, ids)}
    if find_spec("nnsight"):
        arms["nnsight"] = nnsight_arm(deepcopy(model), ids, list(vectors.values()))
    if find_spec("transformer_lens"):
        arms["transformer_lens"] = transformer_lens_arm(deepcopy(model), ids, vectors)
    if len(arms) == 1:
        return {}
    seconds = timed(arms, rounds)["cpu"]
    return {name: ratio(found / seconds["plain"]) for name, found in seconds.items() if name != "plain"}


def generated(model: PreTrainedModel, ids: Tensor) -> Tensor:
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    pad = tokenizer_of(model).pad_token_id
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=pad, **lengths)


def nnsight_arm(model: PreTrainedModel, ids: Tensor, vectors: list[Tensor]) -> Callable[[], Tensor]:
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


def transformer_lens_arm(model: PreTrainedModel, ids: Tensor, vectors: dict) -> Callable[[], Tensor]:
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
