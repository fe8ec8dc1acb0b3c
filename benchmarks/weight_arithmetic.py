"""What weight arithmetic costs: target + RL - SFT of bfloat16 checkpoints of many shards, made on the fly.

Arms, in one run, each in a process of its own: `cp` of the three checkpoints, `steer.deltas.add`, and mergekit's
`linear`, where `--mergekit` names its `mergekit-yaml`. The page cache is what the arms before left; each arm runs
`--rounds` times in an order drawn anew, and the medians count. Wall time ends when the command ends, as with `cp`.
Anonymous memory is the largest RssAnon of the process, read every 20 ms: pages that are mapped from files, and that
the system can drop, do not count; beside it stands what the imports alone take.

The seconds and memory of the imports alone are given beside them: they do not grow with the checkpoint.
On float32 checkpoints of 50 MB the result is compared with mergekit's, number by number: the largest difference over
the largest weight. Targets: memory at most 3 x the largest tensor in float32 + 0.5 GB, time at most 1.2 x that of `cp`.

    GOMP_SPINCOUNT=0 python benchmarks/weight_arithmetic.py --gigabytes 6 --mergekit VENV/bin/mergekit-yaml
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from probes.tables import Table
from steer.checkpoints import Checkpoint
from steer.checkpoints.checkpoint import WHOLE
from steer.checkpoints.stream import Piece, ShardPlan, header_of, stream
from steer.deltas import WeightDelta, add, to_mergekit

WIDTH, MLP, VOCABULARY, SHARD = 2048, 5504, 32_000, 500_000_000
TARGET_TIME, TARGET_SPARE = 1.2, 0.5e9
OURS = "import sys; from steer.deltas._add import add; from steer.deltas.delta import WeightDelta\n"
RUN = OURS + "t, a, b, out = sys.argv[1:]; add(t, WeightDelta.between(a, b), out, strength=0.7)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of an environment of its own")
    parser.add_argument("--folder", type=Path, help="where to work; a passing folder, if left out")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        facts = measure(Path(place), options)
    Console().print(table(facts))
    print(json.dumps(facts))


def measure(place: Path, options: argparse.Namespace) -> dict:
    three = [place / name for name in ("target", "rl", "sft")]
    for seed, folder in enumerate(three):
        make(folder, options.gigabytes * 1e9, seed)
    target = Checkpoint.open(three[0])
    largest = 2 * max(p.bytes for s in target.shards for p in s.places)
    recipe = place / "merge.yaml"
    recipe.write_text(to_mergekit(target, WeightDelta.between(three[1], three[2]), strength=0.7), encoding="utf-8")
    arms: dict[str, list[str]] = {
        "cp": ["cp", "-r", *map(str, three), "OUT"],
        "ours": [sys.executable, "-c", RUN, *map(str, three), "OUT"],
    }
    if options.mergekit:
        arms["mergekit"] = [str(options.mergekit), str(recipe), "OUT"]
    rng, runs = random.Random(0), {name: [] for name in arms}
    for _ in range(options.rounds):
        for name in rng.sample(list(arms), len(arms)):
            out = place / f"{name}-out"
            if name == "cp":
                out.mkdir()
            runs[name].append(timed([str(out) if word == "OUT" else word for word in arms[name]]))
            shutil.rmtree(out)
    imports = timed([sys.executable, "-c", OURS])
    facts = {
        "gigabytes": sum(s.path.stat().st_size for s in target.shards) / 1e9,
        "shards": len(target.shards),
        "largest_tensor_float32_mb": largest / 1e6,
        "load_average": os.getloadavg(),
        "imports": {"seconds": imports[0], "anonymous_mb": imports[1] / 1e6},
        "seconds": {name: statistics.median(s for s, _ in found) for name, found in runs.items()},
        "anonymous_mb": {name: max(m for _, m in found) / 1e6 for name, found in runs.items()},
        "rounds": {name: [round(s, 2) for s, _ in found] for name, found in runs.items()},
    }
    facts["time_over_cp"] = {name: s / facts["seconds"]["cp"] for name, s in facts["seconds"].items()}
    facts["within_memory"] = facts["anonymous_mb"]["ours"] * 1e6 <= 3 * largest + TARGET_SPARE
    facts["within_time"] = facts["time_over_cp"]["ours"] <= TARGET_TIME
    if options.mergekit:
        facts["against_mergekit"] = parity(place / "float32", options.mergekit)
    return facts


def parity(place: Path, mergekit: Path) -> dict:
    three = [place / name for name in ("target", "rl", "sft")]
    for seed, folder in enumerate(three):
        make(folder, 50e6, seed, torch.float32)
    delta, recipe = WeightDelta.between(three[1], three[2]), place / "merge.yaml"
    add(three[0], delta, place / "ours", strength=0.7)
    recipe.write_text(to_mergekit(Checkpoint.open(three[0]), delta, strength=0.7, dtype="float32"), encoding="utf-8")
    timed([str(mergekit), str(recipe), str(place / "theirs")])
    return compare(place / "ours", place / "theirs")


def make(folder: Path, size: float, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """A Llama-like checkpoint of about `size` bytes: shared random numbers, and a little of its own per donor."""
    torch.manual_seed(0)
    pool, own = torch.randn(1 << 22) * 0.02, torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)) * 2e-4
    values = (pool + own).to(dtype)
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (VOCABULARY, WIDTH))]
    layer = 0
    while sum(dtype.itemsize * torch.Size(shape).numel() for _, shape in shapes) < size:
        at = f"model.layers.{layer}"
        shapes += [(f"{at}.self_attn.{m}_proj.weight", (WIDTH, WIDTH)) for m in "qkvo"]
        shapes += [(f"{at}.mlp.{m}_proj.weight", (MLP, WIDTH)) for m in ("gate", "up")]
        shapes += [(f"{at}.mlp.down_proj.weight", (WIDTH, MLP)), (f"{at}.input_layernorm.weight", (WIDTH,))]
        shapes += [(f"{at}.post_attention_layernorm.weight", (WIDTH,))]
        layer += 1
    shapes.append(("model.norm.weight", (WIDTH,)))
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, shape in shapes:
        if sum(dtype.itemsize * torch.Size(s).numel() for _, s in groups[-1]) > SHARD:
            groups.append([])
        groups[-1].append((name, shape))
    files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]

    def piece(shape: Sequence[int]) -> Piece:
        count = torch.Size(shape).numel()
        sizes = [len(values)] * (count // len(values)) + [count % len(values)]
        return Piece(dtype.itemsize * count, lambda: (values[:n] for n in sizes if n))

    def finish(made: Path) -> None:
        named = {name: file for file, group in zip(files, groups, strict=True) for name, _ in group}
        (made / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": named}), encoding="utf-8"
        )
        config = {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH,
            "intermediate_size": MLP, "num_hidden_layers": layer, "num_attention_heads": 16,
            "num_key_value_heads": 16, "vocab_size": VOCABULARY, "tie_word_embeddings": True,
        }  # fmt: skip
        (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
        words = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
        (made / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")

    word = next(word for word, known in WHOLE.items() if known == dtype)
    plans = [
        ShardPlan(file, header_of([(n, word, s) for n, s in group]), tuple(piece(s) for _, s in group))
        for file, group in zip(files, groups, strict=True)
    ]
    stream(folder, plans, {"seed": seed}, finish)


def timed(command: Sequence[str]) -> tuple[float, float]:
    """Seconds until the command ended, and its largest RssAnon in bytes."""
    start, most = time.perf_counter(), 0.0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        while process.poll() is None:
            most = max(most, anonymous(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise RuntimeError(log.read().decode()[-2000:])
    return seconds, most


def anonymous(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def compare(ours: Path, theirs: Path) -> dict:
    a, b = Checkpoint.open(ours), Checkpoint.open(theirs)
    assert set(a.names) == set(b.names)
    far = most = 0.0
    odd = 0
    for name in a.names:
        x, y = a.read(name).float(), b.read(name).float()
        far, most, odd = (
            max(far, float((x - y).abs().max())),
            max(most, float(x.abs().max())),
            odd + int((x != y).sum()),
        )
    numbers = sum(torch.Size(a.shape(name)).numel() for name in a.names)
    return {"largest_relative": far / most, "differing": odd, "numbers": numbers}


def table(facts: dict) -> Table:
    rows = tuple(
        (name, seconds, facts["time_over_cp"][name], facts["anonymous_mb"][name])
        for name, seconds in facts["seconds"].items()
    )
    title = f"{facts['gigabytes']:.2f} GB each, {facts['shards']} shards"
    return Table(("arm", "seconds", "over cp", "RssAnon, MB"), rows, title)


if __name__ == "__main__":
    main()
