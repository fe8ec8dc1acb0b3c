"""Behaviour vectors and efficiency pairs, against their formulas; attribution, against a finite difference."""

from functools import partial

import numpy as np
import pytest
import torch
from families import build

from probes.directions._attribution import attribution, log_probability_of
from probes.directions.direction import difference_in_means
from probes.generation.completions import Completion
from probes.generation.sampling import Sampling
from probes.model.architectures import sites_in
from probes.model.delimiters import ThinkingSpan
from probes.model.hooks import attached, captured
from probes.model.sites import Site
from probes.thinking.spans import Span
from steer.evaluation.evaluation import Evaluation
from steer.evaluation.outcomes import Outcomes
from steer.methods import behaviours, efficiency
from steer.methods.behaviours import label_span, strongest_layer
from steer.methods.efficiency import EfficiencySetting, correct_pairs, most_efficient, recipes
from steer.tasks.named import task_named
from steer.tasks.task import Problem

IDS = tuple(torch.randint(6, 97, (40,), generator=torch.Generator().manual_seed(0)).tolist())


def states(model, ids, layer):
    with torch.no_grad(), captured(model, [Site(layer, "resid_post")]) as cache:
        model(torch.tensor([ids]))
    return cache[Site(layer, "resid_post")][0].double()


def moved(x, by):
    return torch.cat([x[:, :-1], x[:, -1:] + by], dim=1)


def test_a_label_is_read_from_the_position_before_it_and_eleven_at_most():
    assert (label_span(IDS, 5, 9).start, label_span(IDS, 5, 9).stop) == (4, 8)
    assert (label_span(IDS, 5, 30).start, label_span(IDS, 5, 30).stop) == (4, 15)
    assert (label_span(IDS, 5, 6).start, label_span(IDS, 5, 6).stop) == (4, 5)
    with pytest.raises(ValueError, match="but this one starts at the first token"):
        label_span(IDS, 0, 4)


def test_behaviour_vectors_are_those_of_the_formula():
    model = build("llama")
    spans = {"backtracking": [(3, 8), (20, 36)], "deduction": [(9, 12)]}
    labelled = {label: [label_span(IDS, *pair) for pair in pairs] for label, pairs in spans.items()}
    overall = [Span(IDS, 2, 40), Span(IDS[::-1], 5, 30)]
    found = behaviours.directions(model, labelled, overall)
    for layer in range(3):
        whole = (states(model, IDS, layer)[2:40].mean(0) + states(model, IDS[::-1], layer)[5:30].mean(0)) / 2
        for label, pairs in spans.items():
            rows = [states(model, IDS, layer)[s - 1 : min(e - 1, s + 10)].mean(0) for s, e in pairs]
            difference = torch.stack(rows).mean(0) - whole
            expected = difference / difference.norm() * whole.norm()
            torch.testing.assert_close(found[label][layer].vector.double(), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="The label 'doubt' has no spans. Generate more, or leave it out."):
        behaviours.directions(model, {"doubt": []}, overall)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere2"])
def test_attribution_is_the_slope_of_the_metric_along_the_direction(family):
    model = build(family).double()
    spans = [Span(IDS[:20], 7, 12), Span(IDS[5:30], 3, 9)]
    directions = list(difference_in_means(model, spans, [Span(IDS, 30, 40)], sites_in(model, "resid_post")).values())
    metric, step = log_probability_of([7, 9]), 1e-3
    expected = torch.zeros(3)
    for span in spans:
        ids = torch.tensor([span.ids[: span.start + 1]])
        for i, direction in enumerate(directions):
            values = []
            for sign in (1, -1):
                nudge = partial(moved, by=sign * step * direction.unit.double())
                with torch.no_grad(), attached(model, direction.site, nudge):
                    values.append(model(ids).logits[0, -1].log_softmax(-1)[[7, 9]].logsumexp(-1))
            expected[i] += float((values[0] - values[1]).abs()) / (2 * step) / len(spans)
    found = attribution(model, directions, spans, metric)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)  # gemma2 norms in float32
    inner = strongest_layer(model, directions, spans, metric)
    assert inner == int(expected.argmax())
    with pytest.raises(ValueError, match="An attribution is measured at spans, but none was given."):
        attribution(model, directions, [], metric)


def completion(problem, sample, length, answer):
    ids = (3, *[7] * (length - 2), 4, 8, 2)
    span = ThinkingSpan(start=3, first=3, end=3 + length, closed=True)
    return Completion(problem, sample, "", "", answer, (1, 9, 5), ids, span, "eos", Sampling(), "m")


def test_pairs_are_the_shortest_and_longest_correct_of_the_same_problem():
    task = task_named("chains")
    problems = [Problem(name, name, "1") for name in "abc"]
    done = [
        *(completion("a", i, *drawn) for i, drawn in enumerate(((9, "1"), (4, "0"), (6, "1"), (12, "0")))),
        *(completion("b", i, 5, "1") for i in range(3)),
        completion("c", 0, 5, "0"),
    ]  # fmt: skip
    pairs = correct_pairs(done, problems, task)
    assert [(a.id, a.thinking_tokens, b.thinking_tokens) for a, b in pairs] == [("a", 6, 9)]
    with pytest.raises(ValueError, match="None of 2 problems has correct completions of two lengths among 8"):
        correct_pairs(done, problems[1:], task)

    model = build("llama")
    for position in ("thinking", "last"):
        vectors = efficiency.directions(model, pairs, position=position)
        for layer, vector in enumerate(vectors):
            means = []
            for c in pairs[0]:
                start = 2 if position == "thinking" else c.span.end - 2
                means.append(states(model, c.all_ids, layer)[start : c.span.end - 1].mean(0))
            torch.testing.assert_close(vector.vector.double(), means[0] - means[1], atol=1e-5, rtol=1e-4)
    made = recipes(model, pairs, strengths=(0.1, 0.2))
    assert len(made) == 2 * 3 * 2
    step = made[EfficiencySetting("last", 1, 0.2)].steps[0]
    assert (step.intervention.site, step.intervention.strength, str(step.scope)) == (
        Site(1, "resid_post"),
        0.2,
        "thinking",
    )


def test_the_most_efficient_setting_is_the_shortest_of_those_that_lose_little():
    task, problems = task_named("chains"), tuple(Problem(str(i), str(i), "1") for i in range(100))

    def arm(right, length):
        correct = np.arange(100)[:, None] < right
        return Outcomes(correct, np.full((100, 1), length), np.zeros((100, 1), dtype=bool))

    settings = [EfficiencySetting("first", 0, strength) for strength in (0.1, 0.2, 0.3)]
    arms = dict(zip(map(str, settings), (arm(70, 12), arm(69, 8), arm(40, 2)), strict=True))
    selection = Evaluation(task, problems, {"plain": arm(70, 15), **arms})
    assert most_efficient(selection, settings) == settings[1]
    assert most_efficient(selection, settings, loss=0.5) == settings[2]
    with pytest.raises(ValueError, match="Every setting loses more than 0.01 accuracy .* loses 0.300. Try smaller"):
        most_efficient(selection, settings[2:])
