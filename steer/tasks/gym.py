"""Tasks of reasoning-gym (Stojanovski et al. 2025): problems without end, answers scored by each dataset's own rule."""

import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from steer.tasks.answers import stated
from steer.tasks.task import Problem, Task

_CHUNK = 200


def gym_task(dataset: str) -> Task:
    """The task `gym:<dataset>`. Raises ValueError for an unknown dataset, ImportError without the extra `[tasks]`."""
    known = _known()
    if dataset not in known:
        raise ValueError(f"reasoning-gym has no dataset {dataset!r}. It has: {', '.join(known)}.")

    def problems(rng: random.Random) -> Iterator[Problem]:
        seen: set[str] = set()
        while True:
            before = len(seen)
            for entry in _dataset(dataset, rng.randrange(2**31), _CHUNK):
                question = str(entry["question"])
                seen.add(question)
                yield Problem(question, question, str(entry["answer"]), facts={"dataset": dataset, "entry": entry})
            if len(seen) == before:
                return  # a small dataset has been seen whole

    return Task(f"gym:{dataset}", "gym", problems)


def scores_fully(answer: str, problem: Problem) -> bool:
    """Whether the dataset's own rule gives what the answer states, or else all of it, the full score.

    Raises ValueError for a problem of another task.
    """
    facts = problem.facts or {}
    if "entry" not in facts:
        raise ValueError(f"The problem {problem.id!r} is not of reasoning-gym, whose rules are asked to score it.")
    piece = stated(answer)
    statement = answer.strip() if piece is None else piece
    return float(_dataset(facts["dataset"], 0, 1).score_answer(answer=statement, entry=facts["entry"])) >= 1.0


@lru_cache(maxsize=1)
def _known() -> tuple[str, ...]:
    _import()
    from reasoning_gym.factory import DATASETS

    return tuple(sorted(DATASETS))


@lru_cache(maxsize=16)
def _dataset(name: str, seed: int, size: int) -> Any:
    return _import().create_dataset(name, seed=seed, size=size)


def _import() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError("Tasks gym:... come from reasoning-gym: pip install 'thinksteer[tasks]'.") from error
    return reasoning_gym
