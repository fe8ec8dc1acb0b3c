"""What reading costs: the mean of every layer's resid_post over each text, in time against the plain forward pass
and in memory from 4,096 to 32,768 tokens.

Time. The fair peer of `probes.activations.record` is the base forward, `model.model(...)`: all blocks and the
final norm, without unembedding; `record` runs the same blocks and stops after the last. The full forward, which ends in
logits, is timed beside it. So are three neighbours that read the same means: transformers' output_hidden_states, a
trace of nnsight that stops after the last block, and run_with_cache of TransformerLens' bridge, which goes on to
logits; the last two only where they are installed (the `peers` extra). Ours also reads the mean norm. A round runs
every arm once, in an order drawn anew; ratios are taken within rounds. One thread.

Memory. `ru_maxrss` of a fresh process each, which reads 16 texts of 128 tokens a batch. glibc learns from what is freed
to keep large blocks for itself, and that reserve moves the peak by tens of MB. So it is measured as it comes, and with
the size from which blocks go straight back to the system held at its initial 128 KiB, which leaves what we keep.

Targets are judged by the processor's clock and by the second peak: the others measure the machine too.

    GOMP_SPINCOUNT=0 python benchmarks/extraction.py [memory] [time]
"""

import json
import os
import random
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context

import numpy as np
import torch
from rich.console import Console
from timing import in_words, ratio, timed
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from probes import Site, Span, load, record
from probes.activations import Recorded
from probes.model import sites_in, tokenizer_of
from probes.tables import Table

ROUNDS, BATCH, POS = 24, 4, 128
MEMORY_BATCH, MEMORY_TOKENS = 16, (4_096, 32_768)
ALLOCATORS = {"as it comes": {}, "threshold held": {"MALLOC_MMAP_THRESHOLD_": "131072"}}
MODELS = ("smollm2", "random")
TARGET_THROUGHPUT, TARGET_GROWTH = 0.97, 20.0
Read = Callable[[], Tensor | None]


def main() -> None:
    torch.set_num_threads(1)
    facts: dict = {"load_average": os.getloadavg()}
    for part in sys.argv[1:] or PARTS:
        facts[part] = {name: PARTS[part](name) for name in MODELS}
    print(json.dumps(facts))


def speed(name: str, rounds: int = ROUNDS) -> dict:
    model = build(name)
    texts = spans(model, BATCH)
    arms = {"ours": partial(ours, model, texts), **forwards(model, texts), **neighbours(model, texts)}
    far = agree(arms, ours(model, texts, keep_sinks=True))  # as the neighbours do, which know of no sinks
    seconds = timed(arms, rounds)
    facts = {
        "median_seconds": {arm: float(np.median(seconds["wall"][arm])) for arm in arms},
        "throughput_of_ours": {
            arm: {clock: ratio(seconds[clock][arm] / seconds[clock]["ours"]) for clock in seconds}
            for arm in arms
            if arm != "ours"
        },
        "largest_relative_difference_from_ours": far,
        "absent": [peer for peer in PEERS if peer not in arms],
        "target_met": ratio(seconds["cpu"]["base forward"] / seconds["cpu"]["ours"])[0] >= TARGET_THROUGHPUT,
    }
    rows = [
        (arm, facts["median_seconds"][arm], *map(in_words, ratios.values()))
        for arm, ratios in facts["throughput_of_ours"].items()
    ]
    columns = ("against", "its median seconds", "throughput of ours, wall clock [95 %]", "processor's clock [95 %]")
    title = f"{name}: {BATCH} x {POS} tokens, {rounds} rounds; absent: {facts['absent']}"
    Console(width=140).print(Table(columns, tuple(rows), title))
    return facts


def memory(name: str) -> dict:
    """Peak resident set of a fresh process that reads few tokens, and of one that reads many, in MB."""
    facts: dict = {allocator: growth(name, settings) for allocator, settings in ALLOCATORS.items()}
    rows = [
        (allocator, tokens, *peaks.values(), facts[allocator]["growth_mb"])
        for allocator in ALLOCATORS
        for tokens, peaks in facts[allocator]["mb"].items()
    ]
    columns = ("allocator", "tokens", "peak MB, loaded", "peak MB, read", "all activations, MB", "growth MB")
    Console(width=140).print(Table(columns, tuple(rows), name))
    return facts | {"target_met": facts["threshold held"]["growth_mb"] < TARGET_GROWTH}


def growth(name: str, settings: Mapping[str, str]) -> dict:
    os.environ.update(settings)  # read by the allocator of a process that starts
    try:
        found = {}
        for tokens in MEMORY_TOKENS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                found[tokens] = process.submit(peak, name, tokens).result()
    finally:
        for key in settings:
            del os.environ[key]
    few, many = (found[tokens]["read"] for tokens in MEMORY_TOKENS)
    return {"mb": found, "growth_mb": many - few}


def peak(name: str, tokens: int) -> dict[str, float]:
    """In a fresh process: read `tokens` tokens batch by batch, merged as they come."""
    torch.set_num_threads(1)
    model = build(name)
    loaded = peak_so_far()
    total: dict[Site, Recorded] = {}
    for start in range(0, tokens // POS, MEMORY_BATCH):
        found = record(model, spans(model, MEMORY_BATCH, seed=start), sites_in(model, "resid_post"))
        total = {site: total[site] + found[site] for site in found} if total else found
    stored = sum(recorded.activation.mean.numel() for recorded in total.values()) * tokens * 4 / 1e6
    return {"loaded": loaded, "read": peak_so_far(), "stored": stored}


def peak_so_far() -> float:
    scale = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def build(name: str) -> PreTrainedModel:
    if name != "random":
        return load(name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=192, num_hidden_layers=30, num_attention_heads=4
    )
    config.architectures = ["LlamaForCausalLM"]  # TransformerLens asks for it
    return load(LlamaForCausalLM(config), tokenizer=any_tokenizer())


def spans(model: PreTrainedModel, texts: int, *, seed: int = 0) -> list[Span]:
    """Random texts of one length, read whole: what a token is does not change what reading it costs."""
    rng = random.Random(seed)
    top = min(1000, model.config.vocab_size)
    return [Span(tuple(rng.randrange(3, top) for _ in range(POS)), 0, POS) for _ in range(texts)]


def ours(model: PreTrainedModel, texts: list[Span], *, keep_sinks: bool = False) -> Tensor:
    found = record(model, texts, sites_in(model, "resid_post"), keep_sinks=keep_sinks)
    return torch.stack([recorded.activation.mean for recorded in found.values()])


def forwards(model: PreTrainedModel, texts: list[Span]) -> dict[str, Read]:
    ids, mask = batch(texts)

    @torch.no_grad()
    def base() -> None:
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)

    @torch.no_grad()
    def full() -> None:
        model(input_ids=ids, attention_mask=mask, use_cache=False)

    @torch.no_grad()
    def hidden_states() -> Tensor:
        out = model.model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        return means(out.hidden_states[1:])  # the last is after the final norm, which is no resid_post

    return {"base forward": base, "full forward": full, "output_hidden_states": hidden_states}


def neighbours(model: PreTrainedModel, texts: list[Span]) -> dict[str, Read]:
    """The readings of the peers that are installed, each on a copy of its own, which it may wrap."""
    found = {peer: build for peer, build in PEERS.items() if find_spec(peer)}
    return {peer: build(deepcopy(model), *batch(texts)) for peer, build in found.items()}


def nnsight_reading(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Read:
    import nnsight

    traced = nnsight.TransformersModel(model, tokenizer=any_tokenizer(), task="text-generation")

    @torch.no_grad()
    def read() -> Tensor:
        with traced.trace({"input_ids": ids, "attention_mask": mask}) as tracer:
            found = [layer.output.mean(1) for layer in traced.model.layers].save()
            tracer.stop()
        return torch.stack(found).mean(1)

    return read


def transformer_lens_reading(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Read:
    from transformer_lens.model_bridge import TransformerBridge

    names = [site.transformer_lens for site in sites_in(model, "resid_post")]
    bridge = TransformerBridge.boot_transformers("any", hf_model=model, tokenizer=any_tokenizer())

    @torch.no_grad()
    def read() -> Tensor:
        _, cache = bridge.run_with_cache(ids, attention_mask=mask, names_filter=names)
        return means([cache[name] for name in names])

    return read


PEERS: dict[str, Callable[[PreTrainedModel, Tensor, Tensor], Read]] = {
    "nnsight": nnsight_reading,
    "transformer_lens": transformer_lens_reading,
}


def any_tokenizer() -> PreTrainedTokenizerBase:
    """The peers want one, and then read ids."""
    return tokenizer_of(load("organism"))


def batch(texts: list[Span]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([text.ids for text in texts])
    return ids, torch.ones_like(ids)


def means(layers: Sequence[Tensor]) -> Tensor:
    return torch.stack([layer.mean(1).mean(0) for layer in layers])


def agree(arms: Mapping[str, Read], mine: Tensor) -> dict[str, float]:
    """How far each neighbour's reading is from ours, at most, in all layers but the last; it must be rounding."""
    mine, far = mine[:-1], {}
    for arm, read in arms.items():
        theirs = read() if arm != "ours" else None
        if theirs is not None:
            far[arm] = float((theirs[:-1] - mine).abs().max() / mine.abs().max())
            assert far[arm] < 1e-4, f"{arm} reads something else: {far[arm]:.2g} away."
    return far


PARTS: dict[str, Callable[[str], dict]] = {
    "memory": memory,
    "time": speed,
}  # in this order: a child starts at its parent's peak


if __name__ == "__main__":
    main()
