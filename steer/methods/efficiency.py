"""Efficiency-Steering-style directions: from long correct thinking to short correct thinking of the same problem.

After Efficiency Steering (Zhao et al. 2025, arXiv 2506.15647). Established there: a single direction, without training,
from the shortest and the longest correct completion of the same problem. Not verified, as no code is public: how many
samples a problem, the position, the layer, the normalisation, the strength, and every figure. So position, layer and
strength are chosen here on a selection split, and nothing is claimed about the paper's numbers. Completions of one
problem are alike up to their first thought, so that the opening of the thinking is no position to read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from transformers import PreTrainedModel

from probes.directions.direction import Direction
from probes.directions.paired import contrast_vectors
from probes.generation.completions import Completion, by_problem
from probes.model.architectures import n_layers, sites_in
from probes.thinking.spans import POSITIONS, position_named
from steer.evaluation.evaluation import Evaluation
from steer.interventions.activation import Add
from steer.recipes.recipe import Recipe
from steer.recipes.scope import Scope
from steer.tasks.grading import is_correct
from steer.tasks.task import Problem, Task

Pair = tuple[Completion, Completion]
# Completions of one problem are alike up to their first thought: nothing is read there.
READ = tuple(name for name, position in POSITIONS.items() if position.of == "completion" and name != "first")
METHOD = "Efficiency-Steering-style (after Zhao et al. 2025)"


@dataclass(frozen=True)
class EfficiencySetting:
    """Where the pairs are read, the layer, and the strength in units of the stream's mean norm there.

    >>> from steer.methods.efficiency import EfficiencySetting
    >>> str(EfficiencySetting("thinking", layer=2, strength=0.5))
    'thinking position, layer 2, strength 0.5'
    """

    position: str
    layer: int
    strength: float

    def __str__(self) -> str:
        return f"{self.position} position, layer {self.layer}, strength {self.strength:g}"


def correct_pairs(completions: Sequence[Completion], problems: Sequence[Problem], task: Task) -> list[Pair]:
    """Of each problem, its shortest and its longest correct completion, where they differ in length.

    Raises ValueError where no problem has two correct completions of different lengths.

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.evaluation import solve
    >>> from steer.methods import efficiency
    >>> model, task = load("organism"), task_named("chains")
    >>> problems = task.sample(6, "probe")
    >>> completions = solve(model, problems, sampling=Sampling(1.0, 1.0, max_new_tokens=48), samples=4)
    >>> pairs = efficiency.correct_pairs(completions, problems, task)
    >>> [(short.thinking_tokens, long.thinking_tokens) for short, long in pairs]
    [(3, 14), (23, 34), (20, 36), (14, 21)]
    """
    groups = by_problem(completions)
    pairs = []
    for problem in problems:
        right = [c for c in groups.get(problem.id, ()) if c.span is not None and is_correct(c, problem, task.grader)]
        right.sort(key=lambda c: c.thinking_tokens)
        if right and right[0].thinking_tokens < right[-1].thinking_tokens:
            pairs.append((right[0], right[-1]))
    if not pairs:
        raise ValueError(
            f"None of {len(problems)} problems has correct completions of two lengths among {len(completions)} "
            "completions. Draw more samples of each problem, at a higher temperature."
        )
    return pairs


def directions(model: PreTrainedModel, pairs: Sequence[Pair], *, position: str = "thinking") -> list[Direction]:
    """One direction for each layer's resid_post: mean over problems of efficient less verbose, read at the mean of the
    thinking or at its last position. Raises ValueError for another position.

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.evaluation import solve
    >>> from steer.methods import efficiency
    >>> model, task = load("organism"), task_named("chains")
    >>> problems = task.sample(6, "probe")
    >>> completions = solve(model, problems, sampling=Sampling(1.0, 1.0, max_new_tokens=48), samples=4)
    >>> pairs = efficiency.correct_pairs(completions, problems, task)
    >>> vectors = efficiency.directions(model, pairs, position="last")
    >>> [str(vector.site) for vector in vectors]
    ['L0.resid_post', 'L1.resid_post', 'L2.resid_post', 'L3.resid_post']
    """
    read = position_named(position, "completion")
    efficient, verbose = ([read(pair[side]) for pair in pairs] for side in (0, 1))
    return list(contrast_vectors(model, efficient, verbose, sites_in(model, "resid_post")).values())


def recipes(
    model: PreTrainedModel, pairs: Sequence[Pair], *, strengths: Sequence[float], scope: str | Scope = "thinking"
) -> dict[EfficiencySetting, Recipe]:
    """A recipe for every position, layer and strength: what the selection split chooses from.

    A strength is in units of the stream's mean norm at the layer; above 0 it steers towards short correct thinking.

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.evaluation import solve
    >>> from steer.methods import efficiency
    >>> model, task = load("organism"), task_named("chains")
    >>> problems = task.sample(6, "probe")
    >>> completions = solve(model, problems, sampling=Sampling(1.0, 1.0, max_new_tokens=48), samples=4)
    >>> pairs = efficiency.correct_pairs(completions, problems, task)
    >>> recipes = efficiency.recipes(model, pairs, strengths=(0.5, 1.0))
    >>> len(recipes), str(next(iter(recipes)))
    (16, 'thinking position, layer 0, strength 0.5')
    """
    made = {}
    for position in READ:
        vectors = directions(model, pairs, position=position)
        for layer, strength in product(range(n_layers(model)), strengths):
            recipe = Recipe.of(model, [Add.of(vectors[layer], strength)], scope=scope, method=METHOD)
            made[EfficiencySetting(position, layer, strength)] = recipe
    return made


def most_efficient(
    selection: Evaluation, settings: Sequence[EfficiencySetting], *, loss: float = 0.01
) -> EfficiencySetting:
    """The setting with the shortest thinking among those that lose at most `loss` accuracy against plain.

    `selection` has an arm for each setting, named by it. Raises ValueError where every setting loses more.

    >>> from probes import Sampling, load
    >>> from steer import evaluate, task_named
    >>> from steer.decoding import Budget
    >>> from steer.methods.efficiency import EfficiencySetting, most_efficient
    >>> model, task = load("organism"), task_named("chains")
    >>> settings = [EfficiencySetting("last", layer, 0.5) for layer in (1, 2)]
    >>> arms = {str(setting): Budget(30 * setting.layer) for setting in settings}  # instead of their recipes
    >>> sampling = Sampling.of(model, max_new_tokens=48)
    >>> selection = evaluate(model, task, task.sample(4, "select"), arms, sampling=sampling)
    >>> str(most_efficient(selection, settings))
    'last position, layer 1, strength 0.5'
    """
    accurate = [setting for setting in settings if selection.score(str(setting)).difference >= -loss]
    if not accurate:
        best = max(settings, key=lambda setting: selection.score(str(setting)).difference)
        raise ValueError(
            f"Every setting loses more than {loss} accuracy on the selection split; the best, {best}, loses "
            f"{-selection.score(str(best)).difference:.3f}. Try smaller strengths."
        )
    return min(accurate, key=lambda setting: selection.score(str(setting)).length)
