"""Representation Engineering for reasoning: control vectors from a task's answers (Højer et al. 2025).

The paper adds strength * c at one block's output, at every position; its layers and strengths are not published, so
they are to be chosen on a selection split.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from probes.directions.direction import Direction
from probes.directions.paired import Estimator, contrast_vectors
from probes.model.architectures import sites_in
from probes.thinking.spans import text_span
from probes.words import checked
from steer.interventions.activation import Add, Rotate
from steer.recipes.recipe import Recipe


@checked
def directions(
    model: PreTrainedModel,
    positive: Sequence[str],
    negative: Sequence[str] = (),
    *,
    estimator: Estimator = "contrast",
) -> list[Direction]:
    """One vector for each layer's resid_post, read at the last token: of question and right answer (`positive`),
    against the same with a wrong one (`negative`), pair by pair.

    The last token is each text's own, whatever the padding. See `probes.directions.paired` for the estimators.

    >>> from probes import load
    >>> from steer.methods.representation_engineering import directions
    >>> right, wrong = ([f"<bos> a 3 b +4 ? <think> </think> {answer}"] for answer in (7, 2))
    >>> vectors = directions(load("organism"), right, wrong)
    >>> [str(vector.site) for vector in vectors]
    ['L0.resid_post', 'L1.resid_post', 'L2.resid_post', 'L3.resid_post']
    """
    above, below = ([text_span(model, text, position="text_last") for text in texts] for texts in (positive, negative))
    return list(contrast_vectors(model, above, below, sites_in(model, "resid_post"), estimator=estimator).values())


def recipe(model: PreTrainedModel, vector: Direction, strength: float, *, normalise: bool = False) -> Recipe:
    """strength * vector added at every token at the vector's layer; with `normalise` each token keeps its norm.

    The vector is taken raw, as it was estimated.

    >>> from probes import load
    >>> from steer.methods.representation_engineering import directions, recipe
    >>> model = load("organism")
    >>> right, wrong = ([f"<bos> a 3 b +4 ? <think> </think> {answer}"] for answer in (7, 2))
    >>> vector = directions(model, right, wrong)[2]
    >>> recipe(model, vector, 0.5, normalise=True).table().rows
    ((0, 'rotate', 'L2.resid_post', 'all', 0.5),)
    """
    kind = Rotate if normalise else Add
    method = "Representation Engineering for reasoning (Højer et al. 2025)"
    return Recipe.of(model, [kind.of(vector, strength, units="raw")], method=method)
