"""The gate: a recipe says the same in every way that a model is run, or it is told where it does not."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from probes import Site, load
from steer import Ablate, Add, Recipe, Rotate, Schedule, Scope
from steer.engines import Heard, Parity, Way, parity
from steer.engines.vllm import vllm_ways
from steer.runtime import NeverFired

PROMPTS = ["a 3 b +4 c *7", "a 3", "a 5 b -2 c +4 d *3 e +1"]


def unit(seed):
    vector = torch.randn(96, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def recipe(organism):
    falling = Scope("thinking", schedule=Schedule("linear", start=1.0, end=0.0, over=8))
    steps = [
        Add(Site(1, "resid_post"), unit(1), 2.0),
        Ablate(Site(2, "mlp_out"), unit(2)),
        Rotate(Site(2, "resid_post"), unit(3), 2.0),
    ]
    made = Recipe.of(organism, steps, scope="thinking")
    return replace(made, steps=(*made.steps[:2], replace(made.steps[2], scope=falling)))


def test_every_way_of_transformers_is_alike(organism, recipe):
    found = parity(organism, recipe, PROMPTS, max_new_tokens=24)
    assert found.holds
    assert [row[:3] for row in found.table().rows] == [
        (way, 3, 3) for way in ("single", "batched", "static cache", "no cache")
    ]
    assert all(found.logprob_difference(way) < 1e-4 for way in found.ways)
    touched = [way.touched for way in found.ways.values()]
    assert touched[0] == touched[1] == touched[2] > 0
    assert touched[3] is None  # without a cache a token is passed many times
    plain = parity(organism, None, PROMPTS, max_new_tokens=24)
    assert plain.ways["single"].answers != found.ways["single"].answers


def test_a_way_that_steers_otherwise_is_told_and_where(organism, recipe):
    def unsteered(model, _, prompts, n):
        return parity(model, None, [model_text(p) for p in prompts], max_new_tokens=n).ways["single"]

    def model_text(ids):
        return PROMPTS[[len(own) for own in encoded].index(len(ids))]

    from probes.model import tokenizer_of
    from probes.model.tokens import encode_prompt

    encoded = [encode_prompt(tokenizer_of(organism), prompt) for prompt in PROMPTS]
    found = parity(organism, recipe, PROMPTS, max_new_tokens=24, more={"forgetful": unsteered})
    assert not found.holds
    assert found.differing == ["forgetful"]
    prompt, token, margin = found.first_difference("forgetful")
    single, other = (found.ways[way].answers[prompt].ids for way in ("single", "forgetful"))
    assert single[:token] == other[:token]
    assert single[token] != other[token]
    assert margin > 1e-3


def test_only_a_token_of_which_the_model_was_unsure_may_differ():
    one = Heard([5, 6, 7], [-0.1] * 3, [4.0, 5e-4, 3.0])
    ways = {"single": Way((one,)), "other": Way((Heard([5, 8], [-0.3, -0.1]),))}
    assert Parity(ways, 1e-3).holds
    assert not Parity(ways, 1e-4).holds
    assert Parity(ways, 1e-3).logprob_difference("other") == pytest.approx(0.2)  # of what is the same token
    short = {"single": Way((one,)), "other": Way((replace(one, ids=[5, 6]),))}
    assert Parity(short, 1e-3).first_difference("other") == (0, 2, 3.0)  # it ended, and should not have
    assert Parity({**ways, "away": Way(left_out="not installed")}, 1e-3).holds
    assert Parity({**ways, "away": Way(left_out="refused", failed=True)}, 1e-3).differing == ["away"]
    longer = {"single": Way((replace(one, ids=[5, 6], margins=[4.0, 5.0]),)), "other": Way((one,))}
    assert not Parity(longer, 1e-3).holds


def test_a_recipe_that_touches_nothing_and_no_prompt_are_refused(organism):
    late = Recipe.of(organism, [Add(Site(1, "resid_post"), unit(1))], scope=Scope("thinking", window=(500, None)))
    with pytest.raises(NeverFired):
        parity(organism, late, PROMPTS, max_new_tokens=8)
    with pytest.raises(ValueError, match="There is no prompt"):
        parity(organism, late, [])


def test_without_vllm_its_ways_are_left_out(organism, recipe):
    if find_spec("vllm") is not None:
        pytest.skip("it is installed")
    found = parity(organism, recipe, PROMPTS[:1], max_new_tokens=8, more=vllm_ways())
    assert found.holds
    assert found.table().rows[-1][:2] == ("vLLM, chunked, warm", "vllm and thinksteer-vllm not installed")


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM and its plugin: make vllm")
@pytest.mark.parametrize(("family", "name"), [("llama", "one-place"), ("qwen3", "everywhere")])
def test_vllm_is_alike_cold_warm_and_chunked(family, name, tmp_path):
    import cases

    model = cases.build(family, tmp_path / "model")
    prompts = [" ".join(f"w{7 + (5 * i + 3 * j) % 80}" for j in range(24 + 9 * i)) for i in range(6)]
    made = cases.recipes(model)
    found = parity(model, made[name], prompts, more=vllm_ways(folder=tmp_path / "model"), max_new_tokens=24)
    assert found.holds, found.table()
    assert not any(way.left_out for way in found.ways.values())
    assert all(found.logprob_difference(way) < 1e-3 for way in found.ways)
    cold, warm, chunked, again = (found.ways[way].touched for way in list(found.ways)[-4:])
    assert cold == chunked == found.ways["single"].touched
    assert warm <= cold
    assert again <= cold
