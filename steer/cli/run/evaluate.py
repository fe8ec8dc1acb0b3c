"""`steer evaluate`: arms on one set of problems, in pairs, with their controls."""

from pathlib import Path
from typing import Annotated, Any

import typer

import probes.generation
import steer.decoding
import steer.evaluation
import steer.harness
import steer.recipes
import steer.tasks
from steer.cli.dry import evaluation_work, tell
from steer.cli.loading import check_source, model_of
from steer.cli.options import (
    BatchSize,
    Count,
    Delimit,
    DeviceMap,
    DryRun,
    Dtype,
    Json,
    MaxNewTokens,
    Model,
    Samples,
    Seed,
    SplitName,
    Store,
    TaskName,
    Temperature,
    console,
    end,
    sampling_of,
    split_named,
)


def evaluate_(
    model: Model,
    task: TaskName = "chains",
    recipe: Annotated[list[Path] | None, typer.Option(help="A recipe folder, applied at run time.")] = None,
    checkpoint: Annotated[list[Path] | None, typer.Option(help="Another checkpoint to compare.")] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="budget:THINKING[/SOLUTION], wait:N, close:BIAS, converge:M, entropy:BELOW: beside the draw."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="step-by-step, ellipsis, empty-thinking, thinking-off or length:TOKENS.")
    ] = None,
    draws: Annotated[int, typer.Option(min=0, help="Random directions beside each recipe; 0 for none.")] = 3,
    n: Count = 1000,
    split: SplitName = "report",
    samples: Samples = 1,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 64,
    store: Store = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    delimiters: Delimit = None,
    dry_run: DryRun = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Accuracy, thinking length and truncation of a model, of recipes on it beside random directions of the same norm
    and of the same effect on the next token, of decoding controls, of prompts, and of other checkpoints, in pairs.

    With --task lm-eval:NAME, or lm-eval:FILE.yaml, a task of lm-eval, its prompts and its metrics, over the same arms
    but prompts and random directions.
    """
    styles = {words: steer.decoding.prompt_named(words) for words in prompt or []}
    arms: dict[str, steer.evaluation.Arm] = {words: steer.decoding.control_named(words) for words in control or []}
    arms |= styles
    by_harness = task.removeprefix(_HARNESS) if task.startswith(_HARNESS) else None
    if by_harness is not None:
        _check_harness(prompt=prompt, samples=samples, temperature=temperature, dry_run=dry_run)
        steer.harness.check_installed()
    wanted, source = split_named(split), None if by_harness is not None else steer.tasks.task_named(task)
    recipes = {str(path): steer.recipes.Recipe.load(path) for path in recipe or []}
    for path in checkpoint or []:
        check_source(str(path))
    if store is not None and store.exists() and not store.is_dir():
        raise NotADirectoryError(f"--store {store} is a file. Name a folder.")
    loaded = model_of(model, dtype=dtype, device_map=device_map, delimiters=delimiters)
    for own in recipes.values():
        own.check(loaded)
    for style in styles.values():
        style.prefill(loaded)  # refuses what the vocabulary cannot write
    for other in map(str, checkpoint or ()):
        arms[other] = model_of(other, dtype=dtype, device_map=device_map, delimiters=delimiters)
    if source is None:
        named: dict[str, Any] = {**recipes, **arms}
        found = steer.harness.evaluate_harness(
            loaded, str(by_harness), named,
            n=n, max_new_tokens=max_new_tokens, batch_size=batch_size, store=store, seed=seed,
        )  # fmt: skip
        end(found.table(), found.to_dict(), as_json)
        return
    sampling = sampling_of(loaded, source, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    problems = source.sample(n, wanted, seed=seed)
    work = evaluation_work(len(arms) + len(recipes), len(recipes), draws=draws, n=n, samples=samples)
    if dry_run:
        tell(work, loaded, [problem.question for problem in problems], sampling, batch_size, as_json)
        return
    with probes.generation.progress(work.completions, label="evaluating"):
        if recipes and draws:
            judged = steer.evaluation.nulls.plain_spans(
                loaded, source.sample(steer.evaluation.nulls.N_JUDGED, "select", seed=seed), sampling, batch_size
            )
            for name, own in recipes.items():
                nulls, notes = steer.evaluation.nulls.random_arms(loaded, name, own, draws, judged)
                arms |= nulls
                for note in notes:
                    console.print(note)
        result = steer.evaluation.evaluate(
            loaded, source, problems, {**recipes, **arms},
            sampling=sampling, samples=samples, batch_size=batch_size, store=store,
        )  # fmt: skip
    end(result.table(), result.to_dict(), as_json)


_HARNESS = "lm-eval:"


def _check_harness(*, prompt: list[str] | None, samples: int, temperature: float | None, dry_run: bool) -> None:
    """Raise ValueError for what a task of the harness decides itself."""
    given = {"--prompt": prompt, "--samples": samples != 1, "--temperature": temperature is not None}
    for name, value in {**given, "--dry-run": dry_run}.items():
        if value:
            raise ValueError(f"{name} does not go with --task {_HARNESS}NAME, which says itself how it is asked.")
