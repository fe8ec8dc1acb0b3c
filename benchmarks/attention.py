"""What reading the attention of answers costs in memory: the growth of a process, against a plain pass under SDPA.

Each arm is a process of its own, which runs the blocks on a short text first, so that libraries and kernels are there,
and then reads the long one: how far the peak of its resident memory (`ru_maxrss`) rises. `plain` runs the same blocks
and nothing else; `read` asks for a span of 32 keys from the last 512 tokens; `eager` is what asking transformers for
`output_attentions` costs, at 2,048 tokens or fewer, as its maps grow with the square. glibc learns from what is freed
to keep large blocks for itself; the size from which they go straight back is held at its initial 128 KiB, which leaves
what we keep. The median of 3 processes; a random Llama of two layers, float32, one thread.

    python benchmarks/attention.py [TOKENS [ROUNDS]]
"""

import gc
import json
import os
import resource
import subprocess
import sys
from statistics import median

import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from probes import load
from probes.activations import Attended, span_attention
from probes.model import n_layers
from probes.model.hooks import forward_through
from probes.tables import Table

TOKENS, ROUNDS, STEPS, KEYS, EAGER_TOKENS = 8192, 3, 512, range(16, 48), 2048
ARMS = ("plain", "read", "eager plain", "eager")
TARGET = 1.5


def main() -> None:
    if sys.argv[1:2] == ["arm"]:
        print(grown(sys.argv[2], int(sys.argv[3])))
        return
    tokens, rounds = (int(word) for word in (*sys.argv[1:], *map(str, (TOKENS, ROUNDS)[len(sys.argv) - 1 :])))
    sizes = {arm: min(tokens, EAGER_TOKENS) if "eager" in arm else tokens for arm in ARMS}
    mib = {arm: [apart(arm, size) for _ in range(rounds)] for arm, size in sizes.items()}
    middle = {arm: median(found) for arm, found in mib.items()}
    ratio, eager = middle["read"] / middle["plain"], middle["eager"] / middle["eager plain"]
    rows = tuple((arm, sizes[arm], middle[arm], min(mib[arm]), max(mib[arm])) for arm in ARMS)
    columns = ("arm", "tokens", "MiB", "least", "most")
    Console(width=100).print(Table(columns, rows, f"growth of the peak, {rounds} processes each"))
    facts = {"tokens": tokens, "mib": mib, "ratio": ratio, "eager_ratio": eager, "target_met": ratio < TARGET}
    print(json.dumps(facts))


def apart(arm: str, tokens: int) -> float:
    command, env = [sys.executable, __file__, "arm", arm, str(tokens)], {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **env})
    return float(done.stdout.splitlines()[-1])


def grown(arm: str, tokens: int) -> float:
    """MiB by which the peak rises while an arm reads."""
    torch.set_num_threads(1)
    model = tiny(tokens)
    run(model, "plain", 600)
    gc.collect()
    before = peak()
    run(model, arm, tokens)
    return peak() - before


def run(model: PreTrainedModel, arm: str, tokens: int) -> None:
    ids = tuple(torch.randint(0, 97, (tokens,), generator=torch.Generator().manual_seed(0)).tolist())
    if arm == "read":
        start = tokens - STEPS
        span_attention(model, [Attended(ids, tuple(KEYS), start, start, tokens)])
    elif arm == "eager":
        model.set_attn_implementation("eager")
        with torch.no_grad():
            model.model(torch.tensor([ids]), output_attentions=True, use_cache=False)
    else:
        forward_through(model, n_layers(model) - 1, torch.tensor([ids]), torch.ones(1, tokens, dtype=torch.long))


def tiny(tokens: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=97, hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=tokens,
    )  # fmt: skip
    return load(AutoModelForCausalLM.from_config(config), tokenizer=tokenizer())


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    )


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
