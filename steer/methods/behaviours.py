"""Behaviour vectors: what a kind of thought, such as backtracking, has in common (after Venhoff et al. 2025).

The paper has spans labelled by a large language model; here the labels are whoever's gave the spans, for instance the
rules of `probes.thinking.segments`, and the layer is chosen by an explicit metric. Nothing is claimed about its
figures.
"""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from probes.activations._record import record
from probes.directions._attribution import Metric, attribution
from probes.directions.direction import Direction
from probes.directions.provenance import Provenance
from probes.model.paths import sites_in
from probes.thinking.spans import Span

LONGEST = 11  # positions of a span that are read: the one before it and the ten first
EARLY, LATE = 0.15, 0.1  # shares of the layers left out at both ends when one is chosen


def label_span(ids: Sequence[int], start: int, stop: int) -> Span:
    """The positions read of a labelled span [start, stop): from one before it, at most eleven.

    Raises ValueError for a span that starts at the first token, before which there is none.

    >>> from steer.methods import behaviours
    >>> span = behaviours.label_span([1, 7, 8, 9, 10], 2, 4)
    >>> span.start, span.stop
    (1, 3)
    """
    if start < 1:
        raise ValueError("A labelled span is read from the position before it, but this one starts at the first token.")
    return Span(tuple(ids[:stop]), start - 1, max(start, min(stop - 1, start + LONGEST - 1)))


def directions(
    model: PreTrainedModel, labelled: Mapping[str, Sequence[Span]], overall: Sequence[Span]
) -> dict[str, list[Direction]]:
    """For each label and each layer's resid_post, mean over its spans less the mean over whole responses (`overall`),
    scaled to the norm of the latter. Raises ValueError for a label without spans.

    >>> from probes import generate, load
    >>> from probes.thinking import thinking
    >>> from steer.methods import behaviours
    >>> model = load("organism")
    >>> done = generate(model, ["a 3 b +4 c *7", "a 5 b -2"])
    >>> label = behaviours.label_span(done[0].all_ids, len(done[0].prompt_ids) + 2, len(done[0].prompt_ids) + 5)
    >>> found = behaviours.directions(model, {"doubt": [label]}, [thinking(completion) for completion in done])
    >>> len(found["doubt"])
    4
    """
    sites = sites_in(model, "resid_post")
    if empty := [label for label, spans in labelled.items() if not spans]:
        raise ValueError(f"The label {empty[0]!r} has no spans. Generate more, or leave it out.")
    whole = record(model, overall, sites, label="reading responses")
    found: dict[str, list[Direction]] = {}
    for label, spans in labelled.items():
        own = record(model, spans, sites, label=f"reading {label}")
        provenance = Provenance.now(model, f"behaviour vector, {label}", spans, overall)
        found[label] = []
        for site in sites:
            mean = whole[site].activation.mean
            difference = own[site].activation.mean - mean
            vector = difference / difference.norm() * mean.norm()
            norm = float(whole[site].norm.mean)
            found[label].append(Direction(site, vector.float().cpu(), norm, provenance))
    return found


def strongest_layer(model: PreTrainedModel, vectors: Sequence[Direction], spans: Sequence[Span], metric: Metric) -> int:
    """The layer along whose vector the metric would change most, by attribution patching at `spans`.

    The first and last layers, where the raw effect is the embedding's or the unembedding's own, are left out.

    >>> from probes import Direction, load
    >>> from probes.directions import direction_between, log_probability_of
    >>> from probes.model import sites_in, tokenizer_of
    >>> from probes.thinking import text_span
    >>> from steer.methods import behaviours
    >>> model = load("organism")
    >>> vectors = [
    ...     direction_between(model, ["a 3 b +4 quick ?"], ["a 3 b +4 ?"], site)
    ...     for site in sites_in(model, "resid_post")
    ... ]
    >>> metric = log_probability_of(tokenizer_of(model).encode("<think>"))
    >>> behaviours.strongest_layer(
    ...     model, vectors, [text_span(model, "a 3 b +4 ?", position="text_last")], metric
    ... ) in range(4)
    True
    """
    effects = attribution(model, vectors, spans, metric)
    low, high = int(EARLY * len(vectors)), len(vectors) - int(LATE * len(vectors))
    inner = torch.full_like(effects, -torch.inf)
    inner[low:high] = effects[low:high]
    return int(inner.argmax())
