"""`steer evaluate`: arms on one set of problems, in pairs, with their controls."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from transformers import PreTrainedModel

from probes.activations import Span
from probes.models import load
from probes.sampling import Sampling
from steer.cli.options import (
    BatchSize,
    Count,
    Delimit,
    DeviceMap,
    Dtype,
    Json,
    MaxNewTokens,
    Model,
    SplitName,
    Store,
    TaskName,
    Temperature,
    console,
    end,
    sampling_of,
    split_named,
)
from steer.decoding.budgets import Budget, CloseBias, Force
from steer.decoding.control import Control
from steer.decoding.convergence import Converge
from steer.decoding.prompts import Ask, ellipsis, empty_thinking, length_tag, step_by_step, thinking_off
from steer.evaluation._evaluate import Arm, evaluate, solve
from steer.evaluation.nulls import random_recipe
from steer.evaluation.outcomes import Outcomes
from steer.recipes.recipe import Recipe
from steer.runtime.calibration import calibrated, divergence
from steer.tasks.named import task_named
from steer.tasks.task import Problem

N_JUDGED = 32
T = TypeVar("T")


def evaluate_(
    model: Model,
    task: TaskName = "chains",
    recipe: Annotated[list[Path] | None, typer.Option(help="A recipe folder, applied at run time.")] = None,
    checkpoint: Annotated[list[Path] | None, typer.Option(help="Another checkpoint to compare.")] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(help="budget:THINKING[/SOLUTION], wait:N, close:BIAS or converge:M, all beside the model's draw."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="step-by-step, ellipsis, empty-thinking, thinking-off or length:TOKENS.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Random directions beside each recipe; 0 for none.")] = 3,
    n: Count = 1000,
    split: SplitName = "report",
    samples: int = 1,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 64,
    store: Store = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Accuracy, thinking length and truncation of a model, of recipes on it beside random directions of the same norm
    and of the same effect on the next token, of decoding controls, of prompts, and of other checkpoints, in pairs."""
    arms: dict[str, Arm] = {words: control_named(words) for words in control or []}
    arms |= {words: prompt_named(words) for words in prompt or []}
    loaded, source = load(model, dtype=dtype, device_map=device_map, delimiters=delimiters), task_named(task)
    recipes = {str(path): Recipe.load(path) for path in recipe or []}
    for own in recipes.values():
        own.check(loaded)
    sampling = sampling_of(loaded, source, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    nulls: dict[str, dict[str, Recipe]] = {}
    if recipes and draws:
        judged = _judged(loaded, source.sample(N_JUDGED, "select", seed=seed), sampling, batch_size)
        for name, own in recipes.items():
            nulls |= _nulls(loaded, name, own, draws, judged)
    others = {
        str(path): load(path, dtype=dtype, device_map=device_map, delimiters=delimiters) for path in checkpoint or []
    }
    drawn = {name: null for found in nulls.values() for name, null in found.items()}
    result = evaluate(
        loaded,
        source,
        source.sample(n, split_named(split), seed=seed),
        {**recipes, **arms, **others, **drawn},
        sampling=sampling,
        samples=samples,
        batch_size=batch_size,
        store=store,
    )
    for name, found in nulls.items():
        result.arms[name] = Outcomes.pooled([result.arms.pop(draw) for draw in found])
    end(result.table(), result.to_json(), as_json)


def control_named(words: str) -> Control:
    """`budget:100`, `budget:100/20`, `wait:2`, `close:-3` or `converge:3`. Raises ValueError for anything else."""
    kind, _, rest = words.partition(":")
    known: dict[str, Callable[[], Control]] = {
        "budget": lambda: Budget(*(int(tokens) if tokens else None for tokens in rest.split("/"))),
        "wait": lambda: Force(int(rest)),
        "close": lambda: CloseBias(float(rest)),
        "converge": lambda: Converge(int(rest)),
    }
    return _made(known, kind, words, "a decoding control: budget:THINKING[/SOLUTION], wait:N, close:BIAS, converge:M")


def prompt_named(words: str) -> Ask:
    """`step-by-step`, `ellipsis`, `empty-thinking`, `thinking-off` or `length:100`. Raises ValueError otherwise."""
    kind, _, rest = words.partition(":")
    known: dict[str, Callable[[], Ask]] = {
        "step-by-step": step_by_step,
        "ellipsis": ellipsis,
        "empty-thinking": empty_thinking,
        "thinking-off": thinking_off,
        "length": lambda: length_tag(int(rest)),
    }
    return _made(known, kind, words, f"a prompt: {', '.join(known)}:TOKENS")


def _made(known: Mapping[str, Callable[[], T]], kind: str, words: str, what: str) -> T:
    try:
        return known[kind]()
    except (KeyError, TypeError) as error:
        raise ValueError(f"{words!r} is not {what}.") from error
    except ValueError as error:
        raise ValueError(f"{words!r} is not {what}. {error}") from error


def _judged(model: PreTrainedModel, problems: Sequence[Problem], sampling: Sampling, batch_size: int) -> list[Span]:
    """All that the plain model writes to some selection problems: where a null's effect is measured."""
    done = solve(model, problems, sampling=sampling, batch_size=batch_size, label="plain, selection split")
    return [Span(c.all_ids, len(c.prompt_ids) - 1, len(c.all_ids) - 1) for c in done]


def _nulls(
    model: PreTrainedModel, name: str, recipe: Recipe, draws: int, judged: Sequence[Span]
) -> dict[str, dict[str, Recipe]]:
    """Random directions of the same norms, and of the same divergence; what cannot be made is said and left out."""
    found: dict[str, dict[str, Recipe]] = {}
    try:
        same_norm = {f"{name}, random {i}": random_recipe(recipe, seed=i) for i in range(draws)}
        found[f"{name}: random, same norm"] = same_norm
        kl = divergence(model, recipe, judged)
        found[f"{name}: random, same KL"] = {
            f"{draw}, same KL": calibrated(model, null, judged, kl) for draw, null in same_norm.items()
        }
    except ValueError as error:
        console.print(f"{name} is reported without some of its random directions: {error}")
    return found
