"""Rotary frequencies that depend on the longest row of a batch: rows are grouped, so that none changes another."""

import pytest
import torch
from families import BASE, build, build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from probes import Sampling, Site, generate, load
from probes.activations import span_means
from probes.model.positions import rope_groups
from probes.thinking import Span

LIMIT = 24
S = Sampling(max_new_tokens=8, temperature=0)


def long_context(kind):
    torch.manual_seed(0)
    if kind == "longrope":
        rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 9.0, 16.0, 25.0],
                "rope_theta": 10000.0, "original_max_position_embeddings": LIMIT}  # fmt: skip
        words = BASE | {"max_position_embeddings": 4 * LIMIT, "original_max_position_embeddings": LIMIT}
        config = AutoConfig.for_model("phi3", **words, rope_parameters=rope)
    else:
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        config = AutoConfig.for_model("llama", **BASE | {"max_position_embeddings": LIMIT}, rope_parameters=rope)
    return load(AutoModelForCausalLM.from_config(config), tokenizer=build_tokenizer())


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_span_reads_the_same_alone_and_beside_longer_ones(kind):
    model, site = long_context(kind), Site(2, "resid_post")
    spans = [Span(tuple(7 + i % 50 for i in range(n)), 1, n) for n in (5, 20, 24, 25, 40, 40, 60)]
    together = {}
    for batch in span_means(model, spans, [site]):
        together.update(zip(batch.rows, batch.means[site], strict=True))
    for i, span in enumerate(spans):
        (alone,) = span_means(model, [span], [site])
        torch.testing.assert_close(together[i], alone.means[site][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_completion_does_not_depend_on_its_batch(kind):
    """Prompts within the limit, ones that come to pass it while they are written, and ones beyond it."""
    model = long_context(kind)
    prompts = [
        " ".join(f"w{7 + (i * k) % 80}" for i in range(n)) for k, n in enumerate((3, 9, 15, 18, 18, 21, 30, 33), 1)
    ]
    together = generate(model, prompts, sampling=S, batch_size=8)
    alone = generate(model, prompts, sampling=S, batch_size=1)
    assert [c.ids for c in together] == [c.ids for c in alone]


def test_groups_say_who_may_share_a_batch():
    assert rope_groups(build("llama"), [3, 900, 5]) == [[0, 1, 2]]
    phi = long_context("longrope")
    assert rope_groups(phi, [3, 30, 24, 25, 90]) == [[0, 2], [1, 3, 4]]
    assert rope_groups(phi, [19, 20, 20, 90], new=5) == [[0], [1, 2], [3]]
    assert rope_groups(long_context("dynamic"), [3, 30, 24, 30]) == [[0, 2], [1, 3]]
