"""ThinkEdit on a real model, SmolLM2-135M-Instruct, all by command, with its controls; whatever it shows.

The model has no thinking tags: its thinking is what it says before the word "answer". Sums of two to four digits,
at temperature 0.7. About half an hour on one core.

    python benchmarks/smollm2.py [FOLDER]
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

DELIMITERS = ("<|im_start|>assistant\n", " answer")
MODEL = ("smollm2", "--delimiters", *DELIMITERS)


def write_task(path: Path, n: int = 3000) -> None:
    """n different sums, with a prompt that asks for steps and then an answer."""
    rng, lines = random.Random(0), {}
    while len(lines) < n:
        terms = [rng.randint(1, 9) for _ in range(rng.randint(2, 4))]
        question = f"Work out {' + '.join(map(str, terms))} step by step. End with: So the answer is <number>."
        lines[question] = json.dumps({"question": question, "answer": str(sum(terms))})
    path.write_text("\n".join(lines.values()) + "\n", encoding="utf-8")


def steer(*arguments: object) -> dict:
    """Run the command; its last line is JSON."""
    command = [sys.executable, "-m", "steer.cli.main", *map(str, arguments), "--json"]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    print("\n".join(done.stdout.splitlines()[:-1]), flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    write_task(folder / "sums.jsonl")
    task = ("--task", folder / "sums.jsonl", "--batch-size", 32, "--max-new-tokens", 96)
    facts = {"generate": steer("generate", *MODEL, *task, "-n", 32, "-o", folder / "completions.jsonl")}

    glad = [f"I love {word}. It makes me happy." for word in ("rain", "music", "bread", "trains", "winter", "maths")]
    for name, texts in (("glad", glad), ("sad", [t.replace("love", "hate").replace("happy", "sad") for t in glad])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    sides = ("--positive", folder / "glad.jsonl", "--negative", folder / "sad.jsonl", "--site", "L20.resid_post")
    facts["contrast"] = steer("direction", *MODEL, *sides, "-o", folder / "glad.safetensors")

    sizes = ("--n-probe", 256, "--n-select", 64, "--n-report", 192, "--control-draws", 3, "--share", 0.3)
    edits = ("--heads", 0.06, "--kind", "project")
    facts["thinkedit"] = steer("thinkedit", *MODEL, *task, *sizes, *edits, "-o", folder / "edited")
    changed = steer("diff", "smollm2", folder / "edited")["tensors"]
    facts["changed"] = [tensor["tensor"] for tensor in changed]

    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder / "edited")
    facts["reloads_in_plain_transformers"] = True
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
