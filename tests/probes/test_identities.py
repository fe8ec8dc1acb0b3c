"""A family without a row works through the generic row, or is refused with the identity that broke."""

from dataclasses import replace

import pytest
import torch
from families import BASE, N_LAYERS, build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from probes.model import architectures, identities
from probes.model.families import GENERIC, Tap
from probes.model.hooks import captured
from probes.model.loading import load
from probes.model.sites import Site
from steer.folding._fold import fold_error, folded
from steer.folding.draft import NotFoldable
from steer.interventions.activation import Ablate
from steer.recipes.recipe import Recipe

WORKS = {
    "gemma": {"head_dim": 16}, "stablelm": {}, "starcoder2": {}, "olmo": {}, "nemotron": {}, "glm": {"head_dim": 16},
    "seed_oss": {"head_dim": 16}, "arcee": {}, "olmo3": {}, "exaone4": {}, "cohere": {},
}  # fmt: skip
POST_NORM = ("olmo3", "exaone4")
REFUSED = {
    "phi": ({}, "the model has no model.norm"),
    "falcon": ({}, "the model has no model.layers"),
    "bloom": ({}, "the model has no model.layers"),
    "gptj": ({"rotary_dim": 8}, "the model has no model.layers"),
    "mamba": ({}, "the model has no model.layers"),
    "granitemoe": ({"num_local_experts": 4}, "a block has no mlp"),
    "qwen3_next": ({}, "a block has no self_attn.o_proj"),
    "apertus": ({}, "a block has no post_attention_layernorm"),
}


def unlisted(family, extra):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **BASE | extra)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", WORKS)
def test_a_family_whose_generic_row_holds_works(family, tokens):
    assert family not in architectures.ARCHITECTURES
    model = load(unlisted(family, WORKS[family]), tokenizer=build_tokenizer())
    names = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    with captured(model, [Site(layer, name) for layer in range(N_LAYERS) for name in names]) as cache:
        hidden = model(tokens, output_hidden_states=True).hidden_states
    for layer in range(N_LAYERS):
        x = {name: cache[Site(layer, name)] for name in names}
        torch.testing.assert_close(x["resid_post"], x["resid_pre"] + x["attn_out"] + x["mlp_out"])
        torch.testing.assert_close(x["resid_pre"], hidden[layer])
    recipe = Recipe.of(model, [Ablate(Site(1, "result", 2), torch.ones(32))])
    assert fold_error(model, folded(model, recipe), recipe, tokens, torch.ones_like(tokens)) < 1e-5
    whole = Recipe.of(model, [Ablate(Site(1, "attn_out"), torch.ones(32))])
    if family in POST_NORM:
        with pytest.raises(NotFoldable, match="L1.attn_out is behind a norm"):
            folded(model, whole)
    else:
        assert fold_error(model, folded(model, whole), whole, tokens, torch.ones_like(tokens)) < 1e-5
    with pytest.raises(NotFoldable, match="L1.mlp_out is"):
        folded(model, Recipe.of(model, [Ablate(Site(1, "mlp_out"), torch.ones(32))]))


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_whose_generic_row_does_not_hold_is_refused_by_name(family):
    extra, fault = REFUSED[family]
    with pytest.raises(ValueError, match=f"No architecture row for model_type '{family}', and the generic row"):
        load(unlisted(family, extra), tokenizer=build_tokenizer())
    with pytest.raises(ValueError, match=fault):
        load(unlisted(family, extra), tokenizer=build_tokenizer())


@pytest.mark.parametrize(
    ("site", "tap", "fault"),
    [
        ("resid_mid", Tap("input_layernorm", "input"), "resid_mid = resid_pre + attn_out does not hold in layer 0"),
        ("resid_mid", Tap("mlp", "input"), "resid_mid = resid_pre + attn_out does not hold in layer 0"),
        ("attn_out", Tap("mlp", "output"), "resid_mid = resid_pre + attn_out does not hold in layer 0"),
        ("mlp_out", Tap("self_attn", "output"), "resid_post = resid_mid + mlp_out does not hold in layer 0"),
        ("resid_post", Tap("", "input"), "resid_post = resid_mid + mlp_out does not hold in layer 0"),
        ("z", Tap("self_attn", "input"), "z of layer 0 has 32 channels, but o_proj reads 64"),
    ],
)
def test_a_planted_wrong_tap_is_caught_at_load(monkeypatch, site, tap, fault):
    row = replace(GENERIC[0], taps={**GENERIC[0].taps, site: tap})
    monkeypatch.setattr(identities, "GENERIC", (row,))
    with pytest.raises(ValueError, match=fault.replace("+", "[+]")):
        load(unlisted("gemma", {"head_dim": 16}), tokenizer=build_tokenizer())


@pytest.mark.parametrize("norm", ["model.layers.0.input_layernorm", "model.layers.2.post_attention_layernorm"])
def test_a_planted_wrong_final_norm_is_caught_at_load(monkeypatch, norm):
    monkeypatch.setattr(identities, "GENERIC", (replace(GENERIC[0], final_norm=norm),))
    with pytest.raises(ValueError, match="of the last resid_post is not hidden_states"):
        load(unlisted("gemma", {"head_dim": 16}), tokenizer=build_tokenizer())


def test_a_sequential_block_is_not_taken_for_a_parallel_one(monkeypatch):
    monkeypatch.setattr(identities, "GENERIC", (GENERIC[3],))
    with pytest.raises(ValueError, match="attention and MLP do not read the same stream in layer 0"):
        load(unlisted("gemma", {"head_dim": 16}), tokenizer=build_tokenizer())
