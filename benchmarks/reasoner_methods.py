"""A function for each table of the reasoner. Strengths are fixed in advance, but where a selection split chooses."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import numpy as np
import torch
from reasoner_bench import Bench, told
from rich.console import Console
from transformers import PreTrainedModel

from probes import Direction, Site, difference_in_means, load
from probes.activations import Head
from probes.directions import log_probability_of, random_direction
from probes.generation import Completion
from probes.model import n_layers, tokenizer_of
from probes.model.tokens import encode_prompt, words_ids
from probes.thinking import Span, segment_spans, segments
from probes.thinking.spans import POSITIONS
from steer import Add, Controller, Recipe, Scope, task_named
from steer.decoding import Budget, BudgetForcing, CloseBias, PromptStyle
from steer.deltas import open_delta, random_like, shuffled_layers
from steer.evaluation import LabelledDirection, interval_of_mean, nulls
from steer.methods import behaviours, efficiency, seal
from steer.methods import representation_engineering as reprs
from steer.methods.thinkedit import PUBLISHED, LengthReading, ThinkEditSetting
from steer.runtime import Choice, effect_curve, log_probabilities, prompt_spans
from steer.tasks import Problem
from steer.tasks.stories import CUES

STEPS = PromptStyle(after=" Let's think step by step.")


def plain(options: argparse.Namespace) -> dict:
    """The model, and its twin with the reasoning vector, on both kinds of stories."""
    facts, vector = {}, open_delta("reasoner-rl")
    for name, task in (
        ("reasoner", "stories"),
        ("reasoner", "stories-minutes"),
        ("reasoner-target", "stories-minutes"),
    ):
        bench = Bench.of(options, name, task)
        report = bench.report({"with the reasoning vector": vector})
        thinks = {"plain": all(c.span for c in bench.plain)}
        facts[f"{name}, {task}"] = told(f"{name}, {task}", report) | {"every row thinks": thinks}
    return facts


def thinkedit(options: argparse.Namespace) -> dict:
    """ThinkEdit as published, and the best of four settings, beside heads, directions and erasures at random."""
    bench = Bench.of(options)
    readings = {p: LengthReading.of(bench.model, bench.split, position=p) for p in ("thinking", "first")}
    settings = [ThinkEditSetting(*how, "raw") for how in product(("project", "replace"), ("thinking", "first"))]
    recipes = {str(setting): readings[setting.position].recipe(setting) for setting in settings}
    best, selection = bench.choose(recipes)
    setting = next(s for s in settings if str(s) == best)
    reading, edit = readings[setting.position], recipes[best]
    heads = reading.heads(setting)
    spans = [POSITIONS[setting.position](c) for c in bench.split.short[:12]]
    every = list(product(range(n_layers(bench.model)), range(reading.short_writes.shape[1])))

    def edited(which: list[Head], read: LengthReading = reading) -> Recipe:
        return read.edit(which, kind=setting.kind, weight=setting.weight)

    def others(seed: int) -> list[Head]:
        rng = np.random.default_rng(seed)
        return [every[i] for i in rng.permutation(len(every)) if every[i] not in heads][: len(heads)]

    report = bench.report({
        "as published": readings["thinking"].recipe(PUBLISHED),
        "edited": edit,
        "lowest heads": edited(reading.scores(setting.ranking).bottom(len(heads))),
        "random heads": bench.pooled("random heads", lambda i: edited(others(i))),
        "random directions": bench.pooled("random directions", lambda i: edited(heads, reading.at_random(i))),
        "random erasures": bench.pooled(
            "random erasures", lambda i: nulls.random_erasure(bench.model, edit, spans, seed=i)
        ),
    })  # fmt: skip
    facts = told(f"ThinkEdit: {best}", report)
    chosen = {arm: selection.score(arm).accuracy for arm in selection.arms}
    return {"arms": facts, "selected": best, "selection": chosen, "heads": [f"L{a}H{b}" for a, b in heads]}


def alpha(options: argparse.Namespace) -> dict:
    """ThinkEdit's first experiment: the direction added to what attention adds, in all layers and in one."""
    bench = Bench.of(options)
    reading, middle = LengthReading.of(bench.model, bench.split), n_layers(bench.model) // 2
    arms = {f"all layers {a:+g}": reading.steering(a) for a in (-0.08, -0.04, 0.04, 0.08)}
    arms |= {f"layer {middle} {a:+g}": reading.steering(a, layers=[middle]) for a in (-1.0, -0.5, 0.5, 1.0)}
    arms["random directions, all layers +0.08"] = bench.pooled(
        "alpha random", lambda i: reading.at_random(i).steering(0.08)
    )
    return {"arms": told("Steering by α", bench.report(arms))}


def length(options: argparse.Namespace) -> dict:
    """The length direction of the opening of the thinking, in the middle layer, added at that token."""
    bench = Bench.of(options)
    short, long = bench.split.spans("first")
    site = Site(n_layers(bench.model) // 2, "resid_post")
    contrast = LabelledDirection.of(bench.model, long, short, site)
    strengths = (-0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4)

    def at(direction: Direction, strength: float, scope: Scope) -> Recipe:
        return Recipe.of(bench.model, [Add.of(direction, strength)], scope=scope)

    first = Scope("thinking", window=(0, 1))
    arms = {f"{s:+g}": at(contrast.direction, s, first) for s in strengths if s}
    arms["random directions +0.4"] = bench.pooled(
        "length random", lambda i: at(random_direction(contrast.direction, seed=i), 0.4, first)
    )
    report = bench.report(arms)
    doses = [report.arms[f"{s:+g}" if s else "plain"].length.mean(1) for s in strengths]
    return {"arms": told("Length at the opening", report), "fit": fitted(strengths, np.stack(doses))}


def cue(options: argparse.Namespace) -> dict:
    """The direction from prompts with the cue to the same without it, at the first eight tokens of the thinking."""
    bench = Bench.of(options)
    contrast, model = cue_direction(bench), bench.model
    report = bench.report({
        **{f"{s:+g}": opening(model, contrast.direction, s) for s in (-0.5, 0.5, 0.75, 1.0, 1.25)},
        "random directions +1": bench.pooled(
            "cue random", lambda i: opening(model, random_direction(contrast.direction, seed=i), 1.0)
        ),
        "shuffled labels +1": bench.pooled(
            "cue shuffled", lambda i: opening(model, contrast.shuffled(model, seed=i), 1.0)
        ),
    })  # fmt: skip
    return {"arms": told("The cue's direction", report)}


def cue_direction(bench: Bench) -> LabelledDirection:
    stories = [problem.id for problem in bench.task.sample(64, "probe")]
    slow = prompt_spans(bench.model, stories)
    quick = prompt_spans(bench.model, [CUES[i % len(CUES)] + story for i, story in enumerate(stories)])
    return LabelledDirection.of(bench.model, slow, quick, Site(n_layers(bench.model) // 2, "resid_post"))


def opening(model: PreTrainedModel, direction: Direction, strength: float) -> Recipe:
    return Recipe.of(model, [Add.of(direction, strength)], scope=Scope("thinking", window=(0, 8)))


def fitted(strengths: tuple[float, ...], lengths: np.ndarray) -> dict:
    """length = a + b s + c s², and where it turns; 95 % over problems, which are drawn anew 2,000 times."""
    rng = np.random.default_rng(0)
    drawn = [lengths[:, rng.integers(0, lengths.shape[1], lengths.shape[1])].mean(1) for _ in range(2000)]
    fits = np.array([np.polyfit(strengths, means, 2)[::-1] for means in [lengths.mean(1), *drawn]])
    turns = -fits[:, 1] / (2 * fits[:, 2])
    found = {}
    for name, values in (("a", fits[:, 0]), ("b", fits[:, 1]), ("c", fits[:, 2]), ("turns at", turns)):
        found[name] = [round(float(x), 3) for x in (values[0], *np.quantile(values[1:], [0.025, 0.975]))]
    return found


def efficient_directions(bench: Bench) -> dict[str, list[Direction]]:
    problems = bench.task.sample(bench.n // 5, "probe")
    done = bench.solved("four samples", problems, samples=4)
    pairs = efficiency.correct_pairs(done, problems, bench.task)
    return {position: efficiency.directions(bench.model, pairs, position=position) for position in efficiency.READ}


def efficient(options: argparse.Namespace) -> dict:
    """Towards short correct thinking of the same problem: position and layer chosen, the strength fixed."""
    bench = Bench.of(options)
    found, strength = efficient_directions(bench), 0.1
    settings = {f"{position}, layer {layer}": found[position][layer] for position, layer in product(found, (10, 20))}

    def made(direction: Direction, s: float) -> Recipe:
        return Recipe.of(bench.model, [Add.of(direction, s)], scope="thinking", method=efficiency.METHOD)

    best, selection = bench.choose({name: made(d, strength) for name, d in settings.items()})
    report = bench.report({
        **{f"{best} {s:+g}": made(settings[best], s) for s in (-strength, strength, 2 * strength)},
        "random directions": bench.pooled(
            "efficiency random", lambda i: made(random_direction(settings[best], seed=i), strength)
        ),
    })  # fmt: skip
    chosen = {arm: [selection.score(arm).accuracy, selection.score(arm).length] for arm in selection.arms}
    return {"arms": told(f"Efficiency Steering: {best}", report), "selection": chosen}


def seals(options: argparse.Namespace) -> dict:
    """Execution against reflection and transition at the ends of steps: boundaries by keyword, and those that hold."""
    bench = Bench.of(options)
    layer, model = 2 * n_layers(bench.model) // 3, bench.model
    found = {"keywords": seal.directions(model, bench.probed)[layer], "stable": stable(bench, layer)}
    arms = {f"{name} {s:+g}": seal.recipe(model, d, s) for name, d in found.items() for s in (-0.2, 0.2)}
    arms["random directions"] = bench.pooled(
        "seal random", lambda i: seal.recipe(model, random_direction(found["keywords"], seed=i), 0.2)
    )
    cosine = torch.cosine_similarity(*(d.vector for d in found.values()), 0)
    return {"arms": told(f"SEAL, layer {layer}", bench.report(arms)), "cosine of the two": float(cosine)}


def stable(bench: Bench, layer: int) -> Direction:
    """Of the boundaries those at which the model would begin a thought of that kind again, with probability 1/2."""
    words = ("Wait", "Alternatively")
    first = [words_ids(tokenizer_of(bench.model), word, "word")[0] for word in words]
    sides: dict[bool, list[Span]] = {True: [], False: []}
    for completion in bench.probed:
        thoughts = segments(bench.model, completion, "seal")[1:]
        for label in ("execution", "reflection", "transition"):
            sides[label == "execution"] += segment_spans(completion, thoughts, label, position="before")
    kept = {True: [], False: []}
    for execution, spans in sides.items():
        for start in range(0, len(spans), 32):
            batch = spans[start : start + 32]
            other = log_probabilities(bench.model, batch, None)[:, -1].exp()[:, first].sum(1)
            kept[execution] += [s for s, p in zip(batch, other.tolist(), strict=True) if (p < 0.5) == execution]
    print({("execution" if side else "others"): [len(kept[side]), len(sides[side])] for side in sides})
    site = Site(layer, "resid_post")
    return difference_in_means(bench.model, kept[True], kept[False], [site])[site]


def behaviour(options: argparse.Namespace) -> dict:
    """Reflection against whole responses (after Venhoff et al.): labels by keyword, the layer by attribution."""
    bench, labelled = Bench.of(options), list[Span]()
    for completion in bench.probed:
        for thought in segments(bench.model, completion, "seal")[1:]:
            if thought.label == "reflection":
                labelled.append(behaviours.label_span(completion.all_ids, thought.start, thought.stop))
    whole = [Span(c.all_ids, len(c.prompt_ids) - 1, len(c.all_ids) - 1) for c in bench.probed]
    vectors = behaviours.directions(bench.model, {"reflection": labelled}, whole)["reflection"]
    before = [Span(s.ids[: s.start + 1], s.start, s.start + 1) for s in labelled[:64]]
    wait = words_ids(tokenizer_of(bench.model), "Wait", "word")[:1]
    layer = behaviours.strongest_layer(bench.model, vectors, before, log_probability_of(wait))

    def made(direction: Direction, s: float) -> Recipe:
        return Recipe.of(bench.model, [Add.of(direction, s)], scope="thinking")

    arms = {
        name: bench.solved(name, bench.problems, made(vectors[layer], s))
        for s in (-0.2, -0.1, 0.1, 0.2)
        for name in [f"reflection {s:+g}"]
    }
    arms["random directions +0.2"] = bench.pooled(
        "behaviour random", lambda i: made(random_direction(vectors[layer], seed=i), 0.2)
    )
    shown = {arm: reflections(bench.model, done) for arm, done in {"plain": bench.plain, **arms}.items()}
    arms_told = told(f"Reflection, layer {layer}", bench.report(arms))
    return {"arms": arms_told, "layer": layer, "spans": len(labelled), "reflections": shown}


def reflections(model: PreTrainedModel, completions: list[Completion]) -> list[float]:
    """Thoughts that reflect, in a hundred completions, and 95 % over completions."""
    counts = [sum(s.label == "reflection" for s in segments(model, c, "seal")) for c in completions]
    rates = 100 * np.array(counts, dtype=float)
    return [round(float(x), 1) for x in (rates.mean(), *interval_of_mean(rates))]


def representation(options: argparse.Namespace) -> dict:
    """Control vectors of right against wrong answers: the first digit of the answer without a thought, and accuracy."""
    bench = Bench.of(options)
    problems = bench.task.sample(bench.n, "probe")
    style = PromptStyle(thought="", closed=True)
    model, tail = bench.model, " The answer is"
    answer = words_ids(tokenizer_of(model), "The answer is ", "answer")
    digits = [words_ids(tokenizer_of(model), str(d), "digit")[0] for d in range(10)]

    def choice(problem: Problem) -> Choice:
        ids = (*encode_prompt(tokenizer_of(model), problem.question), *style.prefill(model), *answer)
        return Choice(Span(ids, len(ids) - 1, len(ids)), tuple(digits), int(problem.answer[0]))

    right = [f"{p.question}{tail} {p.answer}" for p in problems[:128]]
    wrong = [f"{p.question}{tail} {int(p.answer) + (7, -3, 10)[i % 3]}" for i, p in enumerate(problems[:128])]
    return curves(bench, right, wrong, choice)


def representation_organism(options: argparse.Namespace) -> dict:
    """The same on the organism, whose answers are one digit."""
    model, task = load("organism"), task_named("chains")
    bench = Bench(model, task, options.n, options.batch_size, options.store / "organism")
    bench.folder.mkdir(parents=True, exist_ok=True)
    tokenizer, style = tokenizer_of(model), PromptStyle(thought="", closed=True)
    digits = [words_ids(tokenizer, str(d), "digit")[0] for d in range(10)]

    def choice(problem: Problem) -> Choice:
        ids = (*encode_prompt(tokenizer, problem.question), *style.prefill(model))
        return Choice(Span(ids, len(ids) - 1, len(ids)), tuple(digits), int(problem.answer))

    problems = task.sample(options.n, "probe")[:128]
    right = [f"{p.question} {p.answer}" for p in problems]
    wrong = [f"{p.question} {(int(p.answer) + 3) % 10}" for p in problems]
    return curves(bench, right, wrong, choice, ratios=(-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0), shown=0.5)


def curves(
    bench: Bench,
    right: list[str],
    wrong: list[str],
    choice: Callable[[Problem], Choice],
    *,
    ratios: tuple[float, ...] = (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2),
    shown: float = 0.1,
) -> dict:
    """The mass of the right answer chooses a layer, at `shown`; at ± that, chains are written."""
    model, facts = bench.model, {}
    select, report = ([choice(p) for p in which] for which in (bench.few, bench.problems))
    found = {
        "reading": reprs.directions(model, right, estimator="reading"),
        "contrast": reprs.directions(model, right, wrong),
        "pca": reprs.directions(model, right, wrong, estimator="pca"),
    }

    def at(direction: Direction, ratio: float) -> Recipe:
        """As long as this share of the stream's mean norm."""
        return reprs.recipe(model, direction, ratio * direction.stream_norm / direction.norm)

    arms, span = {}, range(n_layers(model) // 4, n_layers(model))
    for name, directions in found.items():
        mass = {
            layer: effect_curve(model, lambda r, d=directions[layer]: at(d, r), select, [shown]).effects[0].mass
            for layer in span[:: max(1, len(span) // 6)]
        }
        layer = max(mass, key=mass.get)
        curve = effect_curve(model, lambda r, d=directions[layer]: at(d, r), report, ratios)
        null = effect_curve(model, lambda r, d=directions[layer]: at(random_direction(d, seed=0), r), report, ratios)
        Console(width=160).print(name, layer, curve.table(), "random direction", null.table())
        facts[name] = {
            "layer": layer,
            "curve": [vars(e) for e in curve.effects],
            "null": [vars(e) for e in null.effects],
        }
        arms |= {f"{name}, layer {layer} {r:+g}": at(directions[layer], r) for r in (-shown, shown)}
    d = found["contrast"][facts["contrast"]["layer"]]
    arms[f"random directions {shown:+g}"] = bench.pooled(
        f"repr random {shown:+g}", lambda i: at(random_direction(d, seed=i), shown)
    )
    facts["arms"] = told("Representation Engineering", bench.report(arms))
    return facts


def vector(options: argparse.Namespace) -> dict:
    """RL less SFT added to another model of the family, on the domain that neither donor saw. It has no embedding."""
    bench, v = Bench.of(options, "reasoner-target", "stories-minutes"), open_delta("reasoner-rl")
    donor = Bench.of(options, "reasoner", "stories-minutes")
    report = bench.report({
        **{f"target {a:+g} v": (v, a) for a in (-1.0, 0.25, 0.5, 1.0)},
        "attention alone +1": v.selected(["self_attn"]),
        "MLP alone +1": v.selected(["mlp"]),
        "noise of the same norm": bench.pooled("noise", lambda i: random_like(v, seed=i)),
        "shuffled layers": bench.pooled("shuffled", lambda i: shuffled_layers(v, seed=i)),
        "prompt: cue left out": bench.asked_otherwise("no cue", lambda p: p.id),
        "prompt: step by step": STEPS,
        "SFT donor": donor.plain,
        "RL donor": donor.solved("rl", donor.problems, v),
    })  # fmt: skip
    return {"arms": told("The reasoning vector, minutes", report)}


def dial(options: argparse.Namespace) -> dict:
    """CoT-Valve's dial along RL less SFT, seven settings."""
    bench, v = Bench.of(options), open_delta("reasoner-rl")
    report = bench.report({f"{a:+g}": (v, a) for a in (-0.5, 0.25, 0.5, 0.75, 1.0, 1.5)})
    return {"arms": told("The dial RL - SFT", report)}


def decoding(options: argparse.Namespace) -> dict:
    """Decoding controls: budgets, longer thinking that is forced, and a bias on what closes it."""
    bench = Bench.of(options)
    controls = (Budget(40), Budget(80), BudgetForcing(1), BudgetForcing(2), CloseBias(-2.0), CloseBias(2.0))
    return {"arms": told("Decoding", bench.report({str(control): control for control in controls}))}


def prompts(options: argparse.Namespace) -> dict:
    """The cue left out, and *step by step*."""
    bench = Bench.of(options)
    report = bench.report({"cue left out": bench.asked_otherwise("no cue", lambda p: p.id), "step by step": STEPS})
    return {"arms": told("Prompts", report)}


def closing(options: argparse.Namespace) -> dict:
    """The closing token's row of an unembedding of its own scaled: a weight edit that competes with all of these."""
    bench, arms = Bench.of(options), {}
    for factor in (0.75, 1.5):
        with closing_row(bench.model, factor):
            arms[f"closing row × {factor}"] = bench.solved(f"closing row {factor}", bench.problems)
    return {"arms": told("The closing row", bench.report(arms))}


@contextmanager
def closing_row(model: torch.nn.Module, factor: float) -> Iterator[None]:
    """The row of the first token of `</think>` times a factor, in a head that is no longer the embedding's."""
    tied, token = model.lm_head.weight, words_ids(tokenizer_of(model), "</think>", "closing")[0]
    own = tied.detach().clone()
    own[token] *= factor
    model.lm_head.weight = torch.nn.Parameter(own, requires_grad=False)
    try:
        yield
    finally:
        model.lm_head.weight = tied


def loop(options: argparse.Namespace) -> dict:
    """A controller that counts tokens, at three set-points, along the length direction of the opening."""
    bench = Bench.of(options)
    short, long = bench.split.spans("first")
    site = Site(n_layers(bench.model) // 2, "resid_post")
    direction = LabelledDirection.of(bench.model, long, short, site).direction

    def at(d: Direction, aim: float) -> Recipe:
        scope = Scope("thinking", controller=Controller(set_point=aim))
        return Recipe.of(bench.model, [Add.of(d, 0.3)], scope=scope)

    arms = {f"set-point {aim}": at(direction, aim) for aim in (40, 80, 120)}
    arms["set-point 120, random"] = bench.pooled("loop random", lambda i: at(random_direction(direction, seed=i), 120))
    return {"arms": told("The closed loop", bench.report(arms))}
