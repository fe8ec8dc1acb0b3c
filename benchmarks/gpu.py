"""What steering, reading and folding cost on a GPU, and whether the laws hold there: one JSON line.

A random Llama of 8B shape in bfloat16. Decoding: 48 greedy tokens at batch 1, 32 and 128, an Add at the resid_post of
every layer and of one, with a dynamic and with a static cache; ratios to plain generation are taken within rounds, in
an order drawn anew. A decode step's kernels, waits and copies are counted by the profiler. Reading: `record` at every
layer against the base forward. Folding: 4 % of the heads. Laws: the identities, and folded equals steered, over the
tiny families of the tests. Without a GPU, or with `tiny`, all runs on a tiny shape: a trial of the script.

    GOMP_SPINCOUNT=0 python benchmarks/gpu.py [tiny]
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timing import ratio, timed
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from probes import Site, load, record
from probes.model import broken_identity, sites_in, tokenizer_of
from probes.thinking import Span
from steer import Ablate, Add, Recipe, applied, folded

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from families import FAMILIES, build

TINY = "tiny" in sys.argv[1:] or not torch.cuda.is_available()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 32000}  # fmt: skip
TINY_SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 500}  # fmt: skip
BATCHES, NEW, ROUNDS = ((1, 2), 6, 2) if TINY else ((1, 32, 128), 48, 10)
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense")
COPIES = ("cudaMemcpyAsync", "aten::_to_copy")


def main() -> None:
    began = time.monotonic()
    model = built()
    facts: dict = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", "torch": torch.__version__, "tiny": TINY,
    }  # fmt: skip
    facts["laws"] = laws()
    facts["step"] = {arm: step(model, recipe) for arm, recipe in recipes(model).items()}
    facts["decode"] = {f"batch {size}": decode(model, size) for size in BATCHES}
    facts["read"] = reading(model)
    facts["fold"] = folding(model)
    facts["seconds"] = time.monotonic() - began
    print(json.dumps(facts))


def built() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**(TINY_SHAPE if TINY else SHAPE), max_position_embeddings=2048)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return load(model, tokenizer=tokenizer_of(load("organism")))


def recipes(model: PreTrainedModel) -> dict[str, Recipe | None]:
    vectors = torch.randn(len(sites_in(model, "resid_post")), model.config.hidden_size) * 1e-3
    adds = [Add(site, vector, 1.0) for site, vector in zip(sites_in(model, "resid_post"), vectors, strict=True)]
    return {
        "plain": None,
        "one layer": Recipe.of(model, adds[len(adds) // 2 :][:1]),
        "all layers": Recipe.of(model, adds),
    }


def written(model: PreTrainedModel, ids: torch.Tensor, recipe: Recipe | None, **words: object) -> torch.Tensor:
    """Greedy tokens, when the device has written them."""
    words = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **words}
    if recipe is None:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **words)
    else:
        with applied(model, recipe):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **words)
    waited()
    return out


def waited() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def decode(model: PreTrainedModel, batch: int) -> dict:
    ids = torch.randint(3, model.config.vocab_size, (batch, 32), device=DEVICE)
    caches = {"dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True}}
    facts = {}
    for cache, words in caches.items():
        arms = {name: partial(written, model, ids, recipe, **words) for name, recipe in recipes(model).items()}
        seconds = timed(arms, ROUNDS)["wall"]
        facts[cache] = {"plain": float(seconds["plain"].mean())} | {
            name: ratio(seconds[name] / seconds["plain"]) for name in arms if name != "plain"
        }
    return facts


@torch.no_grad()
def step(model: PreTrainedModel, recipe: Recipe | None) -> dict[str, float]:
    """What one decode step takes, the mean over some: kernels (on a CPU: operations), waits and copies."""
    ids, steps = torch.randint(3, 400, (1, 16), device=DEVICE), 16
    counts: Counter[str] = Counter()

    def run() -> None:
        out = model(input_ids=ids, use_cache=True)
        for number in range(steps + 1):
            token = out.logits[:, -1:].argmax(-1)
            if number == 1:
                prof.__enter__()
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        waited()
        prof.__exit__(None, None, None)

    prof = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])])
    if recipe is None:
        run()
    else:
        with applied(model, recipe):
            run()
    for event in prof.events():
        kind = "operations" if event.name.startswith("aten::") else "kernels" if "LaunchKernel" in event.name else ""
        kind = "waits" if event.name in WAITS else "copies" if event.name in COPIES else kind
        counts[kind] += 1
    return {kind: round(n / steps, 2) for kind, n in counts.items() if kind}


@torch.no_grad()
def reading(model: PreTrainedModel) -> dict:
    rows, tokens = (2, 16) if TINY else (8, 512)
    spans = [Span(tuple(torch.randint(3, 400, (tokens,)).tolist()), 0, tokens) for _ in range(rows)]
    ids = torch.tensor([span.ids for span in spans], device=DEVICE)

    def plain() -> None:
        model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        waited()

    def ours() -> None:
        record(model, spans, sites_in(model, "resid_post"))
        waited()

    seconds = timed({"plain": plain, "ours": ours}, ROUNDS)["wall"]
    return {"plain": float(seconds["plain"].mean()), "speed of ours": ratio(seconds["plain"] / seconds["ours"])}


def folding(model: PreTrainedModel) -> dict:
    heads = range(0, model.config.num_attention_heads * model.config.num_hidden_layers, 25)
    places = [divmod(head, model.config.num_attention_heads) for head in heads]
    vector = torch.randn(model.config.hidden_size)
    recipe = Recipe.of(model, [Ablate(Site(layer, "result", head), vector) for layer, head in places])
    began = time.monotonic()
    folded(model, recipe)
    waited()
    return {"heads": len(places), "seconds": time.monotonic() - began}


@torch.no_grad()
def laws() -> dict:
    """How many of the tests' tiny families keep the identities, and are steered by a fold as by its recipe."""
    ids = torch.tensor([[1, 7, 8, 5, 3, 9, 10, 4, 11]], device=DEVICE)
    kept: dict[str, Callable[[PreTrainedModel], bool]] = {
        "identities": lambda model: broken_identity(model) is None,
        "folded is steered": lambda model: steered_alike(model, ids),
    }
    models = {family: build(family).to(DEVICE) for family in FAMILIES}
    broken = {law: [family for family, model in models.items() if not holds(model)] for law, holds in kept.items()}
    return {"families": len(models), "broken": broken}


def steered_alike(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    recipe = Recipe.of(model, [Ablate(Site(1, "result", 1), torch.ones(32))])
    with applied(model, recipe):
        steered = model(ids).logits
    return torch.allclose(folded(model, recipe)(ids).logits, steered, atol=1e-3, rtol=1e-3)


if __name__ == "__main__":
    main()
