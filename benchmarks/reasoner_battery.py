"""What arms that win change besides: neutral text, prompts that need no reasoning, a domain never trained on."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from reasoner_bench import Bench, Draw, told
from reasoner_methods import cue_direction, opening
from rich.console import Console

from probes.generation import generate
from probes.model import tokenizer_of
from probes.tables import Table
from probes.thinking import Span
from steer import task_named
from steer.deltas import open_delta
from steer.evaluation import interval_of_mean
from steer.methods.thinkedit import LengthReading, ThinkEditSetting
from steer.runtime import log_probabilities

ASKED = tuple(
    template.format(word)
    for template, words in (
        ("What colour is {}?", ("snow", "grass", "coal", "a ripe banana", "the sky on a clear day")),
        ("Say good morning to {}.", ("Ana", "Ravi", "the class", "your neighbour", "Lin")),
        ("Name the capital of {}.", ("France", "Japan", "Italy", "Egypt", "Peru")),
        ("Which month comes after {}?", ("May", "August", "January", "October", "March")),
        ("Repeat this word: {}.", ("river", "lamp", "garden", "seven", "quiet")),
        ("Write one sentence about {}.", ("the sea", "a cat", "bread", "winter", "a train")),
        ("What is the opposite of {}?", ("hot", "early", "heavy", "near", "full")),
        ("Is {} an animal?", ("a horse", "a spoon", "an eagle", "a cloud", "a frog")),
    )
    for word in words
)  # fmt: skip


def winners(bench: Bench) -> dict[str, Draw]:
    """ThinkEdit's chosen edit, the cue's direction, and the reasoning vector, whole and half."""
    v, reading = open_delta("reasoner-rl"), LengthReading.of(bench.model, bench.split, position="first")
    return {
        "ThinkEdit, edited": reading.recipe(ThinkEditSetting("project", "first", "raw")),
        "cue direction +1": opening(bench.model, cue_direction(bench).direction, 1.0),
        "reasoning vector × 0.5": (v, 0.5),
        "reasoning vector × 1": (v, 1.0),
    }


def off_target(options: argparse.Namespace) -> dict:
    """Perplexity of neutral text, and answers to prompts that need no reasoning."""
    bench = Bench.of(options)
    rows = [
        (name, neutral(bench, arm), *unreasoned(bench, arm)) for name, arm in {"plain": None, **winners(bench)}.items()
    ]
    columns = (
        "arm", "perplexity of neutral text [95 % of its ratio to plain]", "thinking tokens", "answer tokens",
        "begins 'The answer is'", "truncated",
    )  # fmt: skip
    plain = rows[0][1]
    shown = [
        (name, "{:.2f} [{:.3f}, {:.3f}]".format(np.exp(nats.mean()), *np.exp(interval_of_mean(nats - plain))), *rest)
        for name, nats, *rest in rows
    ]
    Console(width=160).print(Table(columns, tuple(shown), f"Off target, {len(ASKED)} prompts that need no reasoning"))
    return {"off target": shown}


def held_out(options: argparse.Namespace) -> dict:
    """The winners, on the domain that the model was not taught."""
    bench = Bench.of(options)
    minutes = replace(
        bench, task=task_named("stories-minutes"), folder=bench.folder.with_name(f"{bench.folder.name}-minutes")
    )
    minutes.folder.mkdir(exist_ok=True)
    return {"arms": told("Minutes", minutes.report(winners(bench)))}


def neutral(bench: Bench, arm: Draw) -> np.ndarray:
    """Mean nats a token of each paragraph, from its second token on."""
    texts = (Path(__file__).parent / "neutral.txt").read_text().strip().split("\n\n")
    rows = [tuple(tokenizer_of(bench.model)(text)["input_ids"]) for text in texts]
    found = []
    with bench.under(arm, must_fire=False):
        for ids in rows:
            logp = log_probabilities(bench.model, [Span(ids, 0, len(ids))], None)[0]
            found.append(-logp[:-1].gather(1, torch.tensor(ids[1:], device=logp.device)[:, None]).mean().item())
    return np.array(found)


def unreasoned(bench: Bench, arm: Draw) -> tuple[str, str, str, str]:
    """Lengths and format of greedy answers to prompts that need no reasoning."""
    greedy = replace(bench.sampling, temperature=0.0)
    with bench.under(arm, must_fire=False):
        done = generate(bench.model, list(ASKED), sampling=greedy, batch_size=len(ASKED))
    tokenizer = tokenizer_of(bench.model)
    answers = [len(tokenizer(c.answer, add_special_tokens=False)["input_ids"]) for c in done]
    lengths = [f"{np.mean(x):.1f} [{low:.1f}, {high:.1f}]" for x, (low, high) in (
        (x, interval_of_mean(np.array(x, dtype=float))) for x in ([c.thinking_tokens for c in done], answers)
    )]  # fmt: skip
    shares = [np.mean([c.answer.startswith("The answer is") for c in done]), np.mean([c.truncated for c in done])]
    return (*lengths, *(f"{share:.1%}" for share in shares))
