"""A task by its name."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from probes.files import check_keys
from probes.texts import read_json_lines
from steer.tasks import chains, stories
from steer.tasks.grading import grader_for
from steer.tasks.gym import gym_task
from steer.tasks.published import SOURCES, published_task
from steer.tasks.task import Grader, Problem, Task, shared_out

_OWN = chains.TASKS | stories.TASKS
_GRADERS = tuple(rule for rule in get_args(Grader) if rule != "gym")  # whose rules need a dataset


def task_named(name: str, *, path: str | Path | None = None) -> Task:
    """A task by name: one of ours (`chains`, `mirrors`, `stories`, `stories-minutes`), a published dataset,
    `gym:<dataset of reasoning-gym>`, or a JSONL file.

    A file has a line `{"question": ..., "answer": ...}` for each problem, in which `"grader"` may name the rule of
    `is_correct`; else a capital letter is graded as a choice, a number or a formula as mathematics, words as text. Its
    splits are shares of the problems that are there. A published dataset is read from the hub, or
    from a copy in the folder `path`, also written `gsm8k:<folder>`. Raises ValueError for an unknown name.

    >>> from steer import task_named
    >>> problem = task_named("chains").sample(1, "report")[0]
    >>> problem.question, problem.answer
    ('a 6 b +4 c +5 d -3 e -3 f -8', '1')
    """
    kind, colon, rest = name.partition(":")
    if kind.lower() in SOURCES:
        folder = rest if colon else path
        return published_task(kind.lower(), None if folder is None else Path(folder))
    if path is not None:
        raise ValueError(
            f"Only a copy of a published dataset has a folder, but {name!r} is none: {', '.join(SOURCES)}."
        )
    if kind == "gym" and colon:
        return gym_task(rest)
    if name in _OWN:
        return _OWN[name]
    if not Path(name).is_file():
        known = ", ".join([*sorted(_OWN), *SOURCES, "gym:<dataset of reasoning-gym>"])
        raise ValueError(f"{name!r} is neither a task nor a JSONL file. Known tasks: {known}.")
    return _task_from_file(Path(name))


def _task_from_file(path: Path) -> Task:
    problems: dict[str, Problem] = {}
    for where, fields in read_json_lines(path):
        check_keys(fields, ("question", "answer"), where, optional=("grader",))
        question, answer = fields["question"], fields["answer"]
        if not isinstance(question, str) or isinstance(answer, list | dict | None):
            raise ValueError(f"{where} should hold a question and an answer in words.")
        rule = fields.get("grader", grader_for(str(answer)))
        if rule not in _GRADERS:
            raise ValueError(f"{where} has the grader {rule!r:.60}. Known: {', '.join(_GRADERS)}.")
        problem = Problem(question, question, str(answer), grader=rule)
        if problems.setdefault(question, problem).answer != problem.answer:
            raise ValueError(f"{where} asks {question[:60]!r} again, with another answer. Keep one of them.")
    if not problems:
        raise ValueError(f"{path} holds no problems.")
    found = list(problems.values())
    rules = {problem.grader for problem in found}

    def shuffled(rng: random.Random) -> Iterator[Problem]:
        return iter(rng.sample(found, len(found)))

    common = rules.pop() if len(rules) == 1 else None
    return Task(path.stem, common or "math", shuffled, splits=shared_out(found))
