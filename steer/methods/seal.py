"""SEAL: steer the tokens that end a step towards execution, away from reflection and transition (Chen et al. 2025).

The direction is mean(execution) - mean(reflection and transition), read at the token that ends the step before a
thought, and added at such tokens while the model thinks. The first thought, before which no step ends, is not read, as
in three public forks of the authors' code. Their keyword list and their layers were not checked (see
`probes.thinking.RULES`); layer and strength are to be chosen on a selection split.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from probes.directions.direction import Direction, difference_in_means
from probes.generation.completions import Completion
from probes.model.architectures import sites_in
from probes.model.loading import tokenizer_of
from probes.thinking._segments import present_rules, segment_spans, segments, step_ids
from probes.thinking.rules import Rules
from steer.interventions.activation import Add
from steer.recipes.recipe import Recipe
from steer.recipes.scope import Scope

METHOD = "SEAL-style (after Chen et al. 2025)"


def directions(
    model: PreTrainedModel, completions: Sequence[Completion], rules: str | Rules = "seal"
) -> list[Direction]:
    """One direction for each layer's resid_post. Raises ValueError where the rules find thoughts of one side alone.

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.evaluation import solve
    >>> from steer.methods import seal
    >>> model = load("organism")
    >>> problems, sampling = task_named("chains").sample(20, "probe"), Sampling.of(model, max_new_tokens=48)
    >>> completions = solve(model, problems, sampling=sampling)
    >>> vectors = seal.directions(model, completions, "organism")
    >>> [str(vector.site) for vector in vectors]
    ['L0.resid_post', 'L1.resid_post', 'L2.resid_post', 'L3.resid_post']
    """
    execution, others = [], []
    for completion in completions:
        thoughts = segments(model, completion, rules)[1:]  # before the first, no step ends
        execution += segment_spans(completion, thoughts, "execution", position="before")
        for label in ("reflection", "transition"):
            others += segment_spans(completion, thoughts, label, position="before")
    if not execution or not others:
        raise ValueError(
            f"The rules find {len(execution)} thoughts of execution and {len(others)} of reflection or transition in "
            f"{len(completions)} completions, and a direction needs both. Generate more, or name other rules."
        )
    return list(difference_in_means(model, execution, others, sites_in(model, "resid_post")).values())


def recipe(model: PreTrainedModel, vector: Direction, strength: float, *, rules: str | Rules = "seal") -> Recipe:
    """Towards execution at the tokens of the thinking that end a step; strength in units of the stream's mean norm.

    Raises ValueError where the rules end no step at a token.

    >>> from probes import Sampling, load
    >>> from steer import task_named
    >>> from steer.evaluation import solve
    >>> from steer.methods import seal
    >>> model = load("organism")
    >>> problems, sampling = task_named("chains").sample(20, "probe"), Sampling.of(model, max_new_tokens=48)
    >>> completions = solve(model, problems, sampling=sampling)
    >>> vectors = seal.directions(model, completions, "organism")
    >>> seal.recipe(model, vectors[2], 0.5, rules="organism").table().rows
    ((0, 'add', 'L2.resid_post', 'thinking, at 10 token ids', 0.5),)
    """
    known, _ = present_rules(tokenizer_of(model), rules)
    ids = sorted({i for delimiter in known.after for i in step_ids(tokenizer_of(model), delimiter)})
    if not ids:
        raise ValueError(f"The rules {known.name!r} end no step at a token, so there is nowhere to steer: name others.")
    scope = Scope("thinking", tokens=tuple(ids))
    return Recipe.of(model, [Add.of(vector, strength)], scope=scope, method=METHOD)
