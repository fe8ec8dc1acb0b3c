"""What the vLLM plugin does not do is refused by a sentence: of a recipe, of an engine, of a request. Without vLLM."""

from collections.abc import Mapping
from types import SimpleNamespace as Named
from typing import Any

import plugin  # noqa: F401 - the plugin's package becomes importable
import pytest
import torch
from families import build
from thinksteer_vllm.engine.admission import check_request, read_wish, salted, without_beams
from thinksteer_vllm.engine.limits import check_engine, facts_of
from thinksteer_vllm.recipes import read_recipe
from thinksteer_vllm.refusal import Refused
from thinksteer_vllm.settings import Settings, fingerprint, settings_of

from probes import Site
from probes.model import delimiters_of
from steer import Add, Condition, Controller, Recipe, Scale, Scope, Step
from steer.engines.vllm import serving_settings
from steer.interventions.routing import Forbid


def read(folder, *steps, model=None):
    model = model or build("llama")
    made = Recipe(tuple(steps), Recipe.of(model, []).model)
    made.save(folder)
    return read_recipe("mine", folder, fingerprint(folder))


def step(site="L1.resid_post", scope="all", width=32):
    return Step(Add(Site.parse(site), torch.ones(width)), Scope.of(scope))


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (Step(Forbid(Site(1, "routing", expert=0))), "has kind 'forbid', which does not run inside vLLM"),
        (step("L1.mlp_in"), "has site 'L1.mlp_in', which cannot be changed inside vLLM"),
        (step(scope=Scope(condition=Condition(Site(0, "resid_post"), torch.ones(32), 1.0))), "a condition"),
        (step(scope=Scope("thinking", controller=Controller(9.0, 1.0, Site(0, "resid_post"), torch.ones(32)))),
         "predicts by a probe"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_run_is_refused_by_step_and_reason(made, sentence, tmp_path):
    with pytest.raises(Refused, match=sentence):
        read(tmp_path / "r", made)


FACTS = {"model_type": "llama", "n_layers": 3, "d_model": 32}


@pytest.mark.parametrize("change", [{"model_type": "qwen3"}, {"n_layers": 28}, {"d_model": 64}])
def test_a_recipe_of_another_model_is_refused_by_name_and_by_what_differs(change, tmp_path):
    recipe = read(tmp_path / "r", step())
    recipe.check(FACTS, 4, 8)
    ((key, value),) = change.items()
    with pytest.raises(Refused, match=f"'mine' was made for the model .*: {key} {FACTS[key]} there, {value} here"):
        recipe.check(FACTS | change, 4, 8)


@pytest.mark.parametrize(
    ("made", "sentence"),
    [(step(width=31), "has a vector of 31 entries, but the activation there has 32"),
     (step("L3.resid_post"), "names a layer that is not there: the model has 0 to 2"),
     (step("L1H4.z", width=8), "names a head that is not there: the model has 0 to 3")],
)  # fmt: skip
def test_a_vector_or_place_that_does_not_fit_is_refused(made, sentence, tmp_path):
    with pytest.raises(Refused, match=sentence):
        read(tmp_path / "r", made).check(FACTS, 4, 8)


def engine(**changes: Any) -> Named:
    """A config as vLLM's, with which recipes run."""
    config: dict[str, Any] = {
        "parallel_config": {"pipeline_parallel_size": 1, "tensor_parallel_size": 1, "prefill_context_parallel_size": 1,
                            "decode_context_parallel_size": 1, "enable_dbo": False, "ubatch_size": 0},
        "compilation_config": {"pass_config": Named(enable_sp=False, fuse_allreduce_rms=False), "mode": 0},
        "cache_config": {"kv_offloading_size": None}, "load_config": {"load_format": "auto"},
        "device_config": {"device_type": "cpu"},
        "model_config": {"runner_type": "generate", "is_encoder_decoder": False,
                         "hf_text_config": Named(model_type="llama", num_hidden_layers=3, hidden_size=32)},
        "speculative_config": None, "kv_transfer_config": None, "lora_config": None, "diffusion_config": None,
        "quant_config": None,
    }  # fmt: skip
    for path, value in changes.items():
        part, _, name = path.partition("__")
        if name:
            config[part][name] = value
        else:
            config[part] = value
    return Named(**{name: Named(**own) if isinstance(own, Mapping) else own for name, own in config.items()})


LIMITS = {
    "pipeline parallelism": {"parallel_config__pipeline_parallel_size": 2},
    "speculative decoding": {"speculative_config": Named()},
    "no rank has all heads": {"parallel_config__tensor_parallel_size": 2},
    "sequence parallelism and fused all-reduce": {
        "parallel_config__tensor_parallel_size": 2,
        "compilation_config__pass_config": Named(enable_sp=True, fuse_allreduce_rms=False),
    },
    "context parallelism": {"parallel_config__decode_context_parallel_size": 2},
    "micro-batches": {"parallel_config__enable_dbo": True},
    "KV connector": {"kv_transfer_config": Named()},
    "kv_offloading_size": {"cache_config__kv_offloading_size": 4.0},
    "another device's runner": {"device_config__device_type": "xpu"},
    "LoRA": {"lora_config": Named()},
    "diffusion models": {"diffusion_config": Named()},
    "a pooling model": {"model_config__runner_type": "pooling"},
    "an encoder-decoder model": {"model_config__is_encoder_decoder": True},
    "quantised weights": {"quant_config": Named()},
    "its loader": {"load_config__load_format": "tensorizer"},
    "compiled graphs are kept": {"compilation_config__mode": 3},
}


@pytest.mark.parametrize("sentence", LIMITS)
def test_an_engine_that_cannot_be_steered_is_refused_at_start(sentence, tmp_path):
    recipes = {"r": read(tmp_path / "r", step(), step("L1H1.z", width=8), step("L1H1.result"))}
    check_engine(engine(), Settings(recipes))
    check_engine(engine(compilation_config__mode=3), Settings(recipes, sealed=True))
    with pytest.raises(Refused, match=sentence):
        check_engine(engine(**LIMITS[sentence]), Settings(recipes))
    assert facts_of(engine()) == FACTS


def test_tensor_parallelism_is_no_fault_where_no_head_is_named(tmp_path):
    check_engine(engine(parallel_config__tensor_parallel_size=2), Settings({"r": read(tmp_path / "r", step())}))


class Bad(ValueError):
    pass


@pytest.fixture
def settings(tmp_path) -> Settings:
    model = build("llama")
    for name, scope in (("always", "all"), ("shorter", "thinking")):
        Recipe.of(model, [Scale(Site(1, "mlp_out"), 0.5)], scope=scope).save(tmp_path / name)
    own = serving_settings({name: tmp_path / name for name in ("always", "shorter")}, delimiters_of(model))
    read = settings_of(Named(additional_config=own))
    assert read is not None
    return read


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"thinksteer": "nobody"}, "There is no recipe 'nobody'. This server has the recipes: always, shorter"),
        ({"thinksteer": 1}, "There is no recipe 1"),
        ({"thinksteer_strength": 1.0}, "There is no recipe None"),
        ({"thinksteer": "always", "thinksteer_strength": True}, "finite number that multiplies all strengths"),
        ({"thinksteer": "always", "thinksteer_strength": float("nan")}, "but got nan"),
        ({"thinksteer": "always", "thinksteer_layer": 3}, "thinksteer_layer is not known to thinksteer"),
        ({"thinksteer": "always", "thinksteer_admitted": True}, "thinksteer_admitted is not known to thinksteer"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(extra, sentence, settings):
    with pytest.raises(Bad, match=sentence):
        read_wish(extra, settings, Bad)


def test_a_wish_is_read_and_none_is_none(settings):
    assert read_wish({"thinksteer": "always", "thinksteer_strength": 2}, settings, Bad) == ("always", 2.0)
    assert read_wish({"top": 1}, settings, Bad) is None
    assert read_wish(None, None, Bad) is None
    with pytest.raises(Bad, match="started without recipes"):
        read_wish({"thinksteer": "always"}, None, Bad)


@pytest.mark.parametrize(
    ("params", "arguments", "sentence"),
    [
        ({"thinking_token_budget": 9}, {}, "thinking_token_budget is not tested"),
        ({"trace_decode_token_ids": [1]}, {}, "replayed trace"),
        ({}, {"resumable": True}, "goes on streaming in"),
        ({}, {"lora_request": Named()}, "LoRA is not tested"),
    ],
)
def test_what_does_not_go_with_a_recipe_is_refused(params, arguments, sentence):
    check_request(Named(), {}, Bad)
    with pytest.raises(Bad, match=sentence):
        check_request(Named(**params), arguments, Bad)


def request(ids, **changes):
    own = {
        "prompt_token_ids": ids,
        "prompt_embeds": None,
        "mm_features": None,
        "cache_salt": None,
        "sampling_params": Named(extra_args={"thinksteer": "x"}),
    }
    return Named(**own | changes)  # fmt: skip


def salt(settings, name, ids, strength=1.0, **changes):
    own = request(ids, **changes)
    salted(own, name, strength, settings, Bad)
    return own.cache_salt


def test_the_salt_tells_apart_what_must_not_share_blocks(settings):
    one, other = [1, 9, 9, 5, 3], [1, 9, 9, 9, 5, 3]  # the last header ends elsewhere
    mine = salt(settings, "shorter", one)
    assert mine == salt(settings, "shorter", [*one, 8, 8])
    different = [
        salt(settings, "shorter", other), salt(settings, "shorter", one, 2.0), salt(settings, "always", one),
        salt(settings, "shorter", one, cache_salt="a user's"),
    ]  # fmt: skip
    assert len({mine, *different}) == 5
    assert salt(settings, "always", one) == salt(settings, "always", other)  # no phase: turns share their blocks
    assert len(mine) <= 128
    assert not set(mine) & set("@/\\\0")


@pytest.mark.parametrize(
    ("ids", "changes", "sentence"),
    [(None, {}, "came as embeddings"), ([1], {"prompt_embeds": 1}, "came as embeddings"),
     ([1], {"mm_features": [1]}, "images, sound or video"), ([1], {"pooling_params": 1}, "asks for no text")],
)  # fmt: skip
def test_a_prompt_that_is_not_ids_alone_is_refused(ids, changes, sentence, settings):
    with pytest.raises(Bad, match=sentence):
        salt(settings, "always", ids, **changes)


def test_beam_search_is_refused_where_a_recipe_is_asked_for(monkeypatch):
    import thinksteer_vllm.engine.admission as admission

    monkeypatch.setattr(admission, "refusal", Bad)
    wrapped = without_beams(lambda _self, max_tokens: max_tokens)
    assert wrapped(Named(vllm_xargs={"other": 1}), 5) == wrapped(Named(vllm_xargs=None), 5) == 5
    with pytest.raises(Bad, match="cannot follow beam search"):
        wrapped(Named(vllm_xargs={"thinksteer": "always"}), 5)
