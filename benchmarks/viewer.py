"""A chain of 16,000 tokens with 8 tracks as a page: how large it is, how soon it is there, and how smoothly it scrolls.

    python benchmarks/viewer.py [--tokens 16000] [--tracks 8] [--rounds 5]
    python benchmarks/viewer.py --picture docs/chain.png    # a chain of the reasoner, plain and steered, and no more

The page is opened in a new headless Chromium each round, from a file: first contentful paint, and the time until the
page's own scripts are done, are the browser's own clock. Then its text is scrolled from one end to the other, a step a
frame, and the times between frames are taken. Everything is drawn by the processor here, as there is no GPU.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from devtools import browsing
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from probes import Completion, Sampling, direction_between, generate, load
from probes.model import ThinkingSpan, resolve
from probes.tables import Table
from probes.thinking import Rules
from steer import Add, Recipe, Scope, applied
from steer.view import Track, attention, confidence, projections, trajectory, view

PAINT, SIZE = 2.0, 5_000_000  # seconds, bytes
_SCROLL = """new Promise((done) => {
  const box = document.querySelector(".text"), gaps = [], steps = 240, far = box.scrollHeight - box.clientHeight;
  let step = 0, before = performance.now();
  const next = (now) => {
    gaps.push(now - before);
    before = now;
    step++;
    box.scrollTop = (far * step) / steps;
    if (step < steps) requestAnimationFrame(next); else done(gaps.slice(2));
  };
  requestAnimationFrame(next);
})"""
_WORK = """(() => { const { text } = sides[0], far = text.box.scrollHeight - text.box.clientHeight, spent = [];
  for (let step = 0; step < 240; step++) {
    text.box.scrollTop = (far * step) / 240;
    const start = performance.now();
    text.draw();
    spent.push(performance.now() - start);
  }
  return spent;
})()"""


def main() -> None:
    words = argparse.ArgumentParser()
    for name, default in (("tokens", 16_000), ("tracks", 8), ("rounds", 5)):
        words.add_argument(f"--{name}", type=int, default=default)
    words.add_argument("--picture", type=Path)
    given = words.parse_args()
    if given.picture is not None:
        picture(given.picture)
        return
    completion, source = long_completion(given.tokens)
    rng = torch.Generator().manual_seed(0)
    tracks = [
        Track(f"track {i}", torch.randn(len(completion.all_ids), generator=rng).cumsum(0) / 50, "σ", f"group {i % 3}")
        for i in range(given.tracks)
    ]
    with tempfile.TemporaryDirectory() as folder:
        page = view(completion, model=source, tracks=tracks).save(Path(folder) / "chain.html")
        size = page.stat().st_size
        rounds = [opened(page, Path(folder) / f"profile{i}") for i in range(given.rounds)]
    paint, ready = (float(np.median([one[name] for one in rounds])) for name in ("paint", "ready"))
    frames, work = (np.concatenate([one[name] for one in rounds]) for name in ("frames", "work"))
    errors = [error for one in rounds for error in one["errors"]]
    facts = {
        "tokens": len(completion.all_ids),
        "tracks": given.tracks,
        "bytes": size,
        "first paint, s": round(paint / 1000, 3),
        "slowest first paint, s": round(max(one["paint"] for one in rounds) / 1000, 3),
        "scripts done, s": round(ready / 1000, 3),
        "frame, median ms": round(float(np.median(frames)), 1),
        "frame, 99 % ms": round(float(np.quantile(frames, 0.99)), 1),
        "rows drawn a step, 99 % ms": round(float(np.quantile(work, 0.99)), 2),
        "elements of the text": max(one["elements"] for one in rounds),
        "console errors": len(errors),
    }
    Console(width=100).print(
        Table(("what", ""), tuple((k, str(v)) for k, v in facts.items()), "A long chain as a page")
    )
    met = facts["slowest first paint, s"] < PAINT and size < SIZE and not errors
    print(json.dumps({**facts, "target": {"first paint, s": PAINT, "bytes": SIZE, "console errors": 0}, "met": met}))


def long_completion(tokens: int) -> tuple[Completion, PreTrainedTokenizerBase]:
    """A chain of so many tokens after its prompt, in the words of the vocabulary of SmolLM2."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("reasoner"))
    rng, known = random.Random(0), [i for i in tokenizer.get_vocab().values() if i > 20]
    newline = tokenizer.encode(".\n\n", add_special_tokens=False)
    starts = [
        tokenizer.encode(word, add_special_tokens=False) for word in ("Wait", "Alternatively", "Let me check", "So")
    ]
    ids: list[int] = []
    while len(ids) < tokens:
        ids += rng.choice(starts) + rng.choices(known, k=rng.randint(8, 60)) + newline
    ids = ids[:tokens]
    prompt = tokenizer.encode("How many letters are there in all the letters?", add_special_tokens=False)
    begin, end = len(prompt), len(prompt) + len(ids) - 20
    span = ThinkingSpan(begin, begin, end, closed=True, n_close=1)
    text = tokenizer.decode(ids)
    made = Completion(
        "long", 0, tokenizer.decode(prompt), text, "", tuple(prompt), tuple(ids), span, "eos", Sampling(),
        "drawn at random",
    )  # fmt: skip
    return made, tokenizer


def opened(page: Path, profile: Path) -> dict[str, object]:
    with browsing(profile) as tab:
        tab.open(page)
        paint = tab.get(
            "new Promise((done) => new PerformanceObserver((list) => done(list.getEntries()[0].startTime))"
            '.observe({ type: "paint", buffered: true }))'
        )
        return {
            "paint": paint,
            "ready": float(tab.get("document.documentElement.dataset.ready")),
            "frames": tab.get(_SCROLL),
            "work": tab.get(_WORK),
            "elements": tab.get('document.querySelectorAll(".text *").length'),
            "errors": tab.errors,
        }


def picture(output: Path) -> None:
    """The reasoner's chain about some money, beside one that a push back along its length direction set astray."""
    model = load("reasoner")
    purchase = "Max buys 2 tickets for 3 dollars each"
    question = (
        f"Max has 30 dollars. Ada doubles the money of Max. {purchase}. Max spends 4 dollars on lunch. Max earns 8 "
        "dollars. How many dollars does Max have now?"
    )
    sampling = Sampling(max_new_tokens=200)
    (plain,) = generate(model, [question], sampling=sampling)
    texts = ([plain.prompt + opening] for opening in ("Let me go step by step.", "Easy."))
    direction = direction_between(model, *texts, "L15.resid_post", position="text_last")
    recipe = Recipe.of(model, [Add.of(direction, -0.5)], scope=Scope("thinking", window=(40, 60)))
    with applied(model, recipe):
        (steered,) = generate(model, [question], sampling=sampling)
    rules = Rules(
        "steps",
        after=("\n\n",),
        opens={"transition": ("then", "after that", "now", "next")},
        holds={"answer": ("the answer is",)},
    )
    readings = [confidence(), projections({"long thinking": direction}), trajectory(segment=8), attention(purchase)]
    other = view(steered, model=model, tracks=readings, recipe=recipe, rules=rules)
    shown = view(plain, model=model, tracks=readings, rules=rules, beside=other)
    with tempfile.TemporaryDirectory() as folder, browsing(Path(folder) / "profile", size=(1280, 760)) as tab:
        tab.open(shown.save(Path(folder) / "chain.html"))
        share = 1.1 * len(plain.ids) / len(plain.all_ids)
        tab.get(f"sides.forEach((side) => side.chart.zoom({share}, side.chain.length)), redraw()")
        tab.get(f"go(sides[0], {len(plain.prompt_ids) + 45}, true)")
        output.write_bytes(tab.picture())
    print(steered.thinking)


if __name__ == "__main__":
    main()
