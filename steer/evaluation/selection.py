"""The choice of one arm among many, on problems of its own, by successive halving (Jamieson & Talwalkar 2016)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from probes.fields import plain as plain_fields
from probes.generation.completions import Completion
from probes.generation.sampling import Sampling
from probes.tables import Shown, Table
from steer.evaluation._evaluate import PLAIN, Draw, evaluate, solve_with
from steer.evaluation.evaluation import Evaluation, Score
from steer.tasks.task import Problem, Task

SURVIVE = 3  # of so many arms one goes on to the next round, which has twice the problems
FEW = 4  # are not halved
LEAST = 16  # problems of a first round: on fewer, nothing is told apart


@dataclass(frozen=True, eq=False, repr=False)
class Selection(Shown):
    """The rounds of a choice: fewer arms each time, on more of the same problems, the last on all of them.

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.decoding import Budget
    >>> from steer.evaluation import select
    >>> model, task = load("organism"), task_named("chains")
    >>> arms = {f"budget {n}": Budget(n) for n in (2, 4, 8, 16, 32)}
    >>> sampling = Sampling.of(model, max_new_tokens=48)
    >>> selection = select(model, task, task.sample(32, "select"), arms, sampling=sampling)
    >>> [(len(found.arms) - 1, len(found.problems)) for found in selection.rounds], selection.best()[0]
    ([(5, 16), (2, 32)], 'budget 32')
    """

    rounds: tuple[Evaluation, ...]

    @property
    def arms(self) -> list[str]:
        """Every arm of the first round, the baseline among them."""
        return list(self.rounds[0].arms)

    @property
    def problems(self) -> tuple[Problem, ...]:
        return self.rounds[-1].problems

    @property
    def n_settings(self) -> int:
        """Arms that were chosen from."""
        return len(self.arms) - 1

    def last(self, arm: str) -> Evaluation:
        """The last round that an arm took part in."""
        return next(found for found in reversed(self.rounds) if arm in found.arms)

    def score(self, arm: str, subgroup: str | None = None) -> Score:
        """What it scored in the last round that it took part in, whose number of problems is the score's `n`."""
        return self.last(arm).score(arm, subgroup)

    def best(self) -> list[str]:
        """Arms of the last round, the most accurate first; of equals the one that was given first."""
        return _ranked(self.rounds[-1])

    def table(self) -> Table:
        rows = [
            (arm, s.n, s.accuracy, "{:+.3f} to {:+.3f}".format(*s.difference_interval), s.length)
            for arm in self.arms
            for s in [self.score(arm)]
        ]
        columns = ("arm", "problems", "accuracy", "against plain, 95 %", "thinking tokens")
        return Table(columns, tuple(rows), f"Chosen in {len(self.rounds)} rounds")

    def to_dict(self) -> dict[str, Any]:
        return {"arms": {arm: plain_fields(self.score(arm)) for arm in self.arms}}


def select(
    model: PreTrainedModel,
    task: Task,
    problems: Sequence[Problem],
    arms: Mapping[str, Draw],
    *,
    sampling: Sampling,
    kinds: Mapping[str, str] | None = None,
    samples: int = 1,
    batch_size: int = 64,
    store: Path | None = None,
) -> Selection:
    """Compare arms in rounds: a third of them goes on, the most accurate, to twice the problems, until few are left
    and all problems are used. Of 36 arms on 400 problems: 36 on 100, 12 on 200, 4 on 400. Each round begins with the
    problems of the one before, which are not solved again.

    With `kinds`, what kind each arm is, the best of every kind goes on as well. The other parameters are those of
    `steer.evaluate`. Raises ValueError where there is nothing to choose from.

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.decoding import Budget
    >>> from steer.evaluation import select
    >>> model, task = load("organism"), task_named("chains")
    >>> sampling = Sampling.of(model, max_new_tokens=48)
    >>> arms = {"brief": Budget(2), "long": Budget(40)}
    >>> select(model, task, task.sample(8, "select"), arms, sampling=sampling).best()
    ['long', 'brief']
    """
    if not arms:
        raise ValueError("There is no arm to choose from.")
    kinds, rounds, made = kinds or {}, list[Evaluation](), defaultdict[str, list[Completion]](list)
    left, done = set(arms), 0
    for count, upto in schedule(len(arms), len(problems), n_kinds=len(set(kinds.values()))):
        if rounds:
            left = _going_on(_ranked(rounds[-1]), count, kinds)
        part = problems[done:upto]
        ids = {problem.id for problem in part}
        for name in (PLAIN, *(arm for arm in arms if arm in left)):
            draw = arms.get(name)
            if isinstance(draw, Sequence):
                draw = [completion for completion in draw if completion.id in ids]
            made[name] += solve_with(
                model, task, name, draw, part, sampling=sampling, samples=samples, batch_size=batch_size, store=store
            )
        own = {arm: made[arm] for arm in arms if arm in left}
        rounds.append(evaluate(model, task, problems[:upto], own, baseline=made[PLAIN], sampling=sampling))
        done = upto
    return Selection(tuple(rounds))


def schedule(n_arms: int, n_problems: int, *, n_kinds: int = 0) -> list[tuple[int, int]]:
    """How many arms each round has, and how many problems: the last has all, each before it half of the next's.

    >>> from steer.evaluation.selection import schedule
    >>> schedule(36, 400), schedule(4, 400), schedule(36, 20)
    ([(36, 100), (12, 200), (4, 400)], [(4, 400)], [(36, 20)])
    """
    counts = [n_arms]
    while counts[-1] > FEW and n_problems >> len(counts) >= LEAST:
        fewer = max(-(-counts[-1] // SURVIVE), n_kinds)
        if fewer >= counts[-1]:
            break
        counts.append(fewer)
    return [(count, n_problems >> (len(counts) - 1 - i)) for i, count in enumerate(counts)]


def n_solved(n_arms: int, n_problems: int, *, n_kinds: int = 0) -> int:
    """How many problems are solved in all rounds, the baseline's among them.

    >>> from steer.evaluation.selection import n_solved
    >>> n_solved(36, 400), 37 * 400
    (6000, 14800)
    """
    plan = schedule(n_arms, n_problems, n_kinds=n_kinds)
    new = [upto - before for before, upto in pairwise((0, *(upto for _, upto in plan)))]
    return sum((count + 1) * problems for (count, _), problems in zip(plan, new, strict=True))


def _ranked(found: Evaluation) -> list[str]:
    arms = [arm for arm in found.arms if arm != found.baseline]
    return sorted(arms, key=lambda arm: -float(found.arms[arm].correct.mean()))


def _going_on(best: Sequence[str], count: int, kinds: Mapping[str, str]) -> set[str]:
    """The best of each kind, and as many others as there is room for."""
    firsts = {kinds[arm]: arm for arm in reversed(best) if arm in kinds}
    others = [arm for arm in best if arm not in firsts.values()]
    return {*firsts.values(), *others[: count - len(firsts)]}
