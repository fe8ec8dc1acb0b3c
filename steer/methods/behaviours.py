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
from probes.model.architectures import sites_in
from probes.thinking.spans import Span

LONGEST = 11  # positions of a span that are read: the one before it and the ten first
EARLY, LATE = 0.15, 0.1  # shares of the layers left out at both ends when one is chosen


def label_span(ids: Sequence[int], start: int, stop: int) -> Span:
    """The positions read of a labelled span [start, stop): from one before it, at most eleven.

    Raises ValueError for a span that starts at the first token, before which there is none.

    >>> from steer.methods.behaviours import label_span
    >>> label_span(range(30), 5, 28)
    Span(ids=<28 items>, start=4, stop=15, position='', seed=None)
    """
    if start < 1:
        raise ValueError("A labelled span is read from the position before it, but this one starts at the first token.")
    return Span(tuple(ids[:stop]), start - 1, max(start, min(stop - 1, start + LONGEST - 1)))


def directions(
    model: PreTrainedModel, labelled: Mapping[str, Sequence[Span]], overall: Sequence[Span]
) -> dict[str, list[Direction]]:
    """For each label and each layer's resid_post, mean over its spans less the mean over whole responses (`overall`),
    scaled to the norm of the latter. Raises ValueError for a label without spans.

    >>> from probes import load
    >>> from probes.thinking import text_span
    >>> from steer.methods import behaviours
    >>> model = load("organism")
    >>> overall = [text_span(model, f"a {i} b +4 Wait b +4 =5") for i in range(4)]
    >>> labelled = {"backtracking": [behaviours.label_span(span.ids, 4, 7) for span in overall]}
    >>> vectors = behaviours.directions(model, labelled, overall)["backtracking"]
    >>> [str(vector.site) for vector in vectors], round(vectors[2].norm, 1)
    (['L0.resid_post', 'L1.resid_post', 'L2.resid_post', 'L3.resid_post'], 14.4)
    """
    sites = sites_in(model, "resid_post")
    if empty := [label for label, spans in labelled.items() if not spans]:
        raise ValueError(f"The label {empty[0]!r} has no spans. Generate more, or leave it out.")
    whole = record(model, overall, sites, label="reading responses")
    vectors: dict[str, list[Direction]] = {}
    for label, spans in labelled.items():
        moments = record(model, spans, sites, label=f"reading {label}")
        provenance = Provenance.now(model, f"behaviour vector, {label}", spans, overall)
        vectors[label] = []
        for site in sites:
            mean = whole[site].activation.mean
            difference = moments[site].activation.mean - mean
            vector = difference / difference.norm() * mean.norm()
            norm = float(whole[site].norm.mean)
            vectors[label].append(Direction(site, vector.float().cpu(), norm, provenance))
    return vectors


def strongest_layer(model: PreTrainedModel, vectors: Sequence[Direction], spans: Sequence[Span], metric: Metric) -> int:
    """The layer along whose vector the metric would change most, by attribution patching at `spans`.

    The first and last layers, where the raw effect is the embedding's or the unembedding's own, are left out.
    `vectors` are of all layers, in order.

    >>> from probes import load
    >>> from probes.thinking import text_span
    >>> from steer.methods import behaviours
    >>> model = load("organism")
    >>> overall = [text_span(model, f"a {i} b +4 Wait b +4 =5") for i in range(4)]
    >>> labelled = {"backtracking": [behaviours.label_span(span.ids, 4, 7) for span in overall]}
    >>> vectors = behaviours.directions(model, labelled, overall)["backtracking"]
    >>> from probes.directions import log_probability_of
    >>> from probes.model import tokenizer_of
    >>> wait = log_probability_of(tokenizer_of(model).encode("Wait"))
    >>> behaviours.strongest_layer(model, vectors, overall, wait)
    0
    """
    effects = attribution(model, vectors, spans, metric)
    low, high = int(EARLY * len(vectors)), len(vectors) - int(LATE * len(vectors))
    inner = torch.full_like(effects, -torch.inf)
    inner[low:high] = effects[low:high]
    return int(inner.argmax())
