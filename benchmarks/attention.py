"""What reading the attention of answers costs in memory: the growth of a process, against a plain pass under SDPA.

Each arm is a process of its own, which reads a short text first, so that libraries and kernels are there, and then the
long one: how far the peak of its resident memory (`ru_maxrss`) rises above what it held in between. `plain` runs the
same blocks and nothing else; `read` asks for a span of 32 keys from the last 512 tokens; `eager` is what asking
transformers for `output_attentions` costs, at 2,048 tokens or fewer, as its maps grow with the square. A random Llama
of two layers, float32, one thread.

    python benchmarks/attention.py [TOKENS]
"""

import gc
import json
import resource
import subprocess
import sys

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from probes import load
from probes.activations import Attended, span_attention
from probes.model import n_layers
from probes.model.hooks import forward_through
from probes.tables import Table

TOKENS, STEPS, KEYS, EAGER_TOKENS = 8192, 512, range(16, 48), 2048
ARMS = ("plain", "read", "eager plain", "eager")
TARGET = 1.5


def main() -> None:
    if len(sys.argv) > 2:
        print(grown(sys.argv[2], int(sys.argv[1])))
        return
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else TOKENS
    sizes = {arm: min(tokens, EAGER_TOKENS) if "eager" in arm else tokens for arm in ARMS}
    mebibytes = {arm: apart(arm, size) for arm, size in sizes.items()}
    ratio, eager = mebibytes["read"] / mebibytes["plain"], mebibytes["eager"] / mebibytes["eager plain"]
    rows = tuple((arm, sizes[arm], mebibytes[arm]) for arm in ARMS)
    Console(width=100).print(Table(("arm", "tokens", "MiB"), rows, "growth of the peak"))
    print(json.dumps({"tokens": tokens, "mib": mebibytes, "ratio": ratio, "eager_ratio": eager,
                      "target_met": ratio < TARGET}))  # fmt: skip


def apart(arm: str, tokens: int) -> float:
    command = [sys.executable, __file__, str(tokens), arm]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def grown(arm: str, tokens: int) -> float:
    """MiB by which the peak rises while an arm reads."""
    torch.set_num_threads(1)
    model = tiny(tokens)
    run(model, arm, 600)
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
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    )


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
