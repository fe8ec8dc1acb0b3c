"""SEAL reads before a thought and writes at the ends of steps."""

import pytest
import torch

from probes import load
from probes.generation._generate import generate
from probes.generation.sampling import Sampling
from probes.model.hooks import captured
from probes.model.loading import tokenizer_of
from probes.thinking import Rules, segments
from steer.methods import seal
from steer.runtime._applied import applied
from steer.tasks.named import task_named


@pytest.fixture(scope="module")
def model():
    return load("organism")


@pytest.fixture(scope="module")
def completions(model):
    problems = task_named("chains").sample(60, "probe")
    sampling = Sampling.of(model, max_new_tokens=48)
    return generate(model, [p.question for p in problems], ids=[p.id for p in problems], sampling=sampling)


def test_the_vector_is_the_difference_of_means_before_the_thoughts(model, completions):
    vectors = seal.directions(model, completions, "organism")
    site = vectors[2].site
    sides = {True: [], False: []}
    for c in completions:
        with torch.no_grad(), captured(model, [site]) as cache:
            model(torch.tensor([c.all_ids]))
        for segment in segments(model, c, "organism")[1:]:  # before the first, no step ends
            sides[segment.label == "execution"].append(cache[site][0, segment.start - 1].double())
    expected = torch.stack(sides[True]).mean(0) - torch.stack(sides[False]).mean(0)
    torch.testing.assert_close(vectors[2].vector.double(), expected, atol=1e-2, rtol=1e-3)


def test_only_ends_of_steps_in_the_thinking_are_touched(model, completions):
    vector = seal.directions(model, completions, "organism")[1]
    recipe = seal.recipe(model, vector, 0.1, rules="organism")
    c = max(completions, key=lambda c: c.thinking_tokens)
    with torch.no_grad(), applied(model, recipe) as fired:
        model(torch.tensor([c.all_ids]))
    texts = tokenizer_of(model).convert_ids_to_tokens(list(c.all_ids))
    inside = range(c.span.first, c.span.end - 1)
    assert fired.positions() == [[at for at in inside if texts[at].startswith("=")]]
    assert fired.tokens > 2


def test_one_sided_or_placeless_rules_are_refused(model, completions):
    with pytest.raises(ValueError, match="The rules find .* of execution and 0 of reflection or transition in 60"):
        seal.directions(model, completions, Rules("bare", after=("=1",)))
    vector = seal.directions(model, completions, "organism")[1]
    with pytest.raises(ValueError, match="'words' end no step at a token, so there is nowhere to steer: name others."):
        seal.recipe(model, vector, 0.1, rules=Rules("words", before=("Wait",)))
