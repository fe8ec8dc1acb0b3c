"""Compare arms on one set of problems: accuracy, thinking length and truncation, paired, with intervals."""

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from probes.generation._generate import generate
from probes.generation.completions import Completion
from probes.generation.engine import Engine
from probes.generation.sampling import Sampling
from probes.model.loading import fingerprint
from probes.words import checked
from steer.decoding.control import Controlled, DecodingControl
from steer.decoding.prompts import PromptStyle
from steer.evaluation.evaluation import Evaluation
from steer.evaluation.outcomes import Outcomes
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied
from steer.tasks.grading import is_correct
from steer.tasks.task import Grader, Problem, Task

Draw = None | Recipe | PreTrainedModel | DecodingControl | PromptStyle | Sequence[Completion]
PLAIN = "plain"


@dataclass(frozen=True)
class Shared:
    """An arm of several draws that share the problems out among them: a null that costs what one draw costs.

    >>> from steer.decoding import Budget
    >>> from steer.evaluation import Shared
    >>> Shared([Budget(thinking=2), Budget(thinking=4)])  # every second problem each
    Shared(draws=[Budget(thinking=2, solution=None), Budget(thinking=4, solution=None)])
    """

    draws: Sequence[Draw]


Arm = Draw | Sequence[Draw] | Shared


def evaluate(
    model: PreTrainedModel,
    task: Task,
    problems: Sequence[Problem],
    arms: Mapping[str, Arm],
    *,
    sampling: Sampling,
    baseline: Draw = None,
    samples: int = 1,
    batch_size: int = 64,
    store: Path | None = None,
    engine: Engine | None = None,
) -> Evaluation:
    """Run every arm on the same problems, and the `baseline`, which is called `plain` and is compared with.

    None is the model as it is; a recipe is applied at run time; a model is run; a control decides over tokens beside
    the model; a `PromptStyle` puts the questions otherwise; completions made elsewhere are graded. A list of these
    is one arm of several draws: each solves all problems, and they are pooled as samples; those of `Shared` share the
    problems out among them.

    All arms draw with the same noise per problem and sample, so that they are compared in pairs. With `store`, a
    folder, completions are kept there, a file for each draw, and what it holds is not generated again. `engine` writes
    in place of transformers (`probes.engines.Engine`), as far as it can do what an arm asks. Raises
    ValueError for an arm without draws, and for one with the baseline's name; and `NeverFired` for a recipe that
    touched no token of what was generated with it.

    >>> from probes import Sampling, load
    >>> from steer import evaluate, task_named
    >>> from steer.decoding import Budget
    >>> model, task = load("organism"), task_named("chains")
    >>> sampling = Sampling.of(model, max_new_tokens=48)
    >>> evaluation = evaluate(model, task, task.sample(8, "report"), {"brief": Budget(thinking=2)}, sampling=sampling)
    >>> {arm: evaluation.score(arm).length for arm in evaluation.arms}  # in thinking tokens
    {'plain': 13.875, 'brief': 3.75}
    """
    if PLAIN in arms:
        raise ValueError(f"The arm {PLAIN!r} is the baseline: give it as baseline=..., not among the arms.")
    if empty := [name for name, arm in arms.items() if not _draws(arm)]:
        raise ValueError(f"The arm {empty[0]!r} is an empty list: it has no draw to pool.")

    attempt = partial(
        solve_with, model, task, sampling=sampling, samples=samples, batch_size=batch_size, store=store, engine=engine
    )
    outcomes = {PLAIN: Outcomes.of(attempt(PLAIN, baseline, problems), problems, task)}
    for name, arm in arms.items():
        draws = _draws(arm)
        names = [name if len(draws) == 1 else f"{name} {i}" for i in range(len(draws))]
        shares = [problems[i :: len(draws)] if isinstance(arm, Shared) else problems for i in range(len(draws))]
        made = [attempt(*part) for part in zip(names, draws, shares, strict=True) if part[2]]
        if isinstance(arm, Shared):
            made = [[completion for part in made for completion in part]]
        outcomes[name] = Outcomes.pooled([Outcomes.of(part, problems, task) for part in made])
    return Evaluation(task, tuple(problems), outcomes)


def solve_with(
    model: PreTrainedModel,
    task: Task,
    name: str,
    draw: Draw,
    problems: Sequence[Problem],
    *,
    sampling: Sampling,
    samples: int,
    batch_size: int,
    store: Path | None,
    engine: Engine | None = None,
) -> Sequence[Completion]:
    """The problems under one draw; completions made elsewhere are what they are."""
    if not (draw is None or isinstance(draw, Recipe | PreTrainedModel | DecodingControl | PromptStyle)):
        return draw
    subject = draw if isinstance(draw, PreTrainedModel) else model
    with applied(model, draw, must_run=False) if isinstance(draw, Recipe) else nullcontext():
        return solve(
            subject,
            problems,
            sampling=sampling,
            samples=samples,
            batch_size=batch_size,
            control=draw if isinstance(draw, DecodingControl) else None,
            style=draw if isinstance(draw, PromptStyle) else PromptStyle(),
            store=within(store, _file_of(name, subject, draw)),
            engine=engine,
            grader=task.grader,
            label=name,
        )


@checked
def solve(
    model: PreTrainedModel,
    problems: Sequence[Problem],
    *,
    sampling: Sampling,
    samples: int = 1,
    batch_size: int = 64,
    control: DecodingControl | None = None,
    style: PromptStyle = PromptStyle(),  # noqa: B008
    store: Path | None = None,
    engine: Engine | None = None,
    grader: Grader | None = None,
    label: str = "solving",
) -> list[Completion]:
    """Completions of the problems' questions, put as `style` says, under a control; named by the problems' ids.

    `store`: see `probes.generation.generate`. With `grader` the progress bar shows the accuracy so far. In the order of
    the problems, and of one problem its samples together. Raises ValueError where the vocabulary
    cannot write the style.

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.evaluation import solve
    >>> model, task = load("organism"), task_named("chains")
    >>> sampling = Sampling.of(model, max_new_tokens=48)
    >>> completion = solve(model, task.sample(3, "report"), sampling=sampling)[0]
    >>> completion.id, completion.answer, completion.thinking_tokens
    ('a 6 b +4 c +5 d -3 e -3 f -8', '1', 20)
    """
    named = {problem.id: problem for problem in problems}
    questions, ids = [style.question(problem.question) for problem in problems], [problem.id for problem in problems]
    return generate(
        model,
        questions,
        ids=ids,
        sampling=sampling,
        samples=samples,
        batch_size=batch_size,
        template=style.template,
        prefill=style.prefill(model),
        decoding=None if control is None else Controlled(model, control),
        store=store,
        engine=engine,
        judge=None if grader is None else lambda c: is_correct(c, named[c.id], grader),
        label=label,
    )


def within(store: str | Path | None, name: str) -> Path | None:
    """A file or folder of that name in a store, which is made; None where nothing is stored."""
    if store is None:
        return None
    Path(store).mkdir(parents=True, exist_ok=True)
    return Path(store) / name


def _file_of(name: str, subject: PreTrainedModel, draw: Draw) -> str:
    """The draw's name in a store, with a checksum of all that the completions' own words do not tell."""
    rule = (
        draw.fingerprint()
        if isinstance(draw, Recipe)
        else str(draw)
        if isinstance(draw, DecodingControl | PromptStyle)
        else ""
    )
    text = f"{name} {fingerprint(subject)} {rule}"
    return f"{re.sub('[^-+.0-9A-Za-z]+', '_', name)[:60]}-{sha256(text.encode()).hexdigest()[:8]}.jsonl"


def _draws(arm: Arm) -> Sequence[Draw]:
    """Of completions there is one draw, which is all of them; other lists are of draws."""
    if isinstance(arm, Shared):
        return arm.draws
    if isinstance(arm, Sequence) and not (arm and all(isinstance(item, Completion) for item in arm)):
        return cast("Sequence[Draw]", arm)
    return [cast("Draw", arm)]
