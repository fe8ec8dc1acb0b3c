"""The row of a family without one is found, or it is refused with the identity that broke."""

from dataclasses import replace

import peft
import pytest
import torch
from families import BASE, FAMILIES, N_LAYERS, build, build_tokenizer
from tiny import tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from probes.activations import HeadScores, head_writes
from probes.model import architectures, broken_identity, n_heads, width_of
from probes.model.families import Tap
from probes.model.hooks import captured
from probes.model.loading import check_source, load
from probes.model.placing import discovery
from probes.model.sites import Site
from probes.thinking import Span
from steer import export
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
    "bert": "a norm stands on the stream itself at the end of block 0",
    "gemma3n_text": r"block 0 reads .4, 2, 5, 32. of .2, 5. tokens",
    "beam": "the modules of block 0 do not add up to what it puts out",
    "whisper": "tokens that are padded on the left have other streams than alone",
    "megatron-bert": "a token changes the stream before it: as it is configured, this is no causal language model",
    "hrm_text": "the model has no list of 24 blocks",
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
def test_a_family_whose_row_is_found_works(family, tokens):
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
    for name in ("attn_out", "mlp_out"):
        whole = Recipe.of(model, [Ablate(Site(1, name), torch.ones(32))])
        if family in POST_NORM:
            with pytest.raises(NotFoldable, match=f"L1.{name} is behind a norm"):
                folded(model, whole)
        else:
            assert fold_error(model, folded(model, whole), whole, tokens, torch.ones_like(tokens)) < 1e-5


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_of_which_no_row_is_found_is_refused_by_name(family):
    fault = f"No architecture row for model_type '{family}', and none is found that holds: {REFUSED[family]}"
    with pytest.raises(ValueError, match=fault):
        load(tiny_model(family), tokenizer=build_tokenizer())


def plant(monkeypatch, change):
    """What is found is changed before it is held to the identities."""
    monkeypatch.setattr(discovery, "found_row", lambda model, real=discovery.found_row: change(real(model)))


@pytest.mark.parametrize(
    ("site", "tap", "fault"),
    [
        ("resid_mid", Tap("input_layernorm", "input"), "resid_mid = resid_pre + attn_out does not hold in layer 0"),
        ("attn_out", Tap("mlp", "output"), "resid_mid = resid_pre + attn_out does not hold in layer 0"),
        ("mlp_out", Tap("self_attn", "output"), "resid_post = resid_mid + mlp_out does not hold in layer 0"),
        ("resid_post", Tap("", "input"), "resid_post = resid_mid + mlp_out does not hold in layer 0"),
        ("z", Tap("self_attn", "input"), "L0.z is no .batch, position, 64., but .2, 5, 32."),
        ("mlp_in", Tap("mlp.nowhere", "input"), "a block has no mlp.nowhere"),
    ],
)
def test_a_planted_wrong_tap_is_caught_at_load(monkeypatch, site, tap, fault):
    plant(monkeypatch, lambda row: replace(row, taps={**row.taps, site: tap}))
    with pytest.raises(ValueError, match=fault.replace("+", "[+]")):
        load(unlisted("gemma", {"head_dim": 16}), tokenizer=build_tokenizer())


@pytest.mark.parametrize("norm", ["model.layers.0.input_layernorm", "model.layers.2.post_attention_layernorm", ""])
def test_a_planted_wrong_final_norm_is_caught_at_load(monkeypatch, norm):
    plant(monkeypatch, lambda row: replace(row, final_norm=norm))
    with pytest.raises(ValueError, match="of the last resid_post is not hidden_states"):
        load(unlisted("gemma", {"head_dim": 16}), tokenizer=build_tokenizer())


def test_a_sequential_block_is_not_taken_for_a_parallel_one(monkeypatch):
    plant(monkeypatch, lambda row: replace(row, parallel="always"))
    with pytest.raises(ValueError, match="attention and MLP do not read the same stream in layer 0"):
        load(unlisted("gemma", {"head_dim": 16}), tokenizer=build_tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_we_wrote_hold_too(family, dtype):
    assert broken_identity(build(family, dtype=dtype)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_is_measured_against_itself_not_against_the_stream(dtype):
    """minicpm3 scales what it adds to the stream, which is near nothing where weights are as small as they begin."""
    torch.manual_seed(0)
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = AutoConfig.for_model("minicpm3", **BASE | sizes | {"num_key_value_heads": 4, "initializer_range": 0.02})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with pytest.raises(ValueError, match="the modules of block 0 do not add up to what it puts out"):
        load(model, tokenizer=build_tokenizer())


@torch.no_grad()
def test_heads_are_counted_in_each_layer(tokens):
    config = AutoConfig.for_model(
        "laguna", **BASE, head_dim=8, num_experts=4, num_experts_per_tok=2, num_attention_heads_per_layer=[4, 2, 6]
    )
    torch.manual_seed(0)
    model = load(AutoModelForCausalLM.from_config(config), tokenizer=build_tokenizer())
    assert [n_heads(model, layer) for layer in range(3)] == [4, 2, 6]
    assert n_heads(model) == 6
    with captured(model, [Site(1, "z", 1)]) as cache:
        model(tokens)
    assert cache[Site(1, "z", 1)].shape[-1] == width_of(model, Site(1, "z", 1)) == 8
    with pytest.raises(IndexError, match="Head 2 is out of range: layer 1 has heads 0 to 1"):
        architectures.tap_of(model, Site(1, "z", 2))
    recipe = Recipe.of(model, [Ablate(Site(layer, "result", 1), torch.ones(32)) for layer in range(3)])
    assert fold_error(model, folded(model, recipe), recipe, tokens, torch.ones_like(tokens)) < 1e-5
    writes = head_writes(model, [Span(tuple(range(3, 9)), 0, 6)], {layer: torch.ones(32) for layer in range(3)})
    assert writes.isnan().tolist() == [[False] * 4 + [True] * 2, [False] * 2 + [True] * 4, [False] * 6]
    assert len(HeadScores(writes, "").top(99)) == 12


def test_heads_that_come_in_pairs_are_found_out(monkeypatch):
    assert n_heads(load(tiny_model("diffllama"), tokenizer=build_tokenizer())) == 2
    monkeypatch.delitem(architectures.ARCHITECTURES, "diffllama")
    with pytest.raises(ValueError, match="a head's queries in layer . change what other heads write"):
        load(tiny_model("diffllama"), tokenizer=build_tokenizer())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "llava"])
def test_the_text_decoder_is_found_inside_a_wrapper(kind, tokens, tmp_path):
    inner = load(wrapped(kind), tokenizer=build_tokenizer())
    assert architectures.architecture_of(inner).layers == "model.language_model.layers"
    site = Site(1, "resid_post")
    with captured(inner, [site]) as cache:
        hidden = inner(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(cache[site], hidden[2])
    recipe = Recipe.of(inner, [Ablate(Site(1, "result", 2), torch.ones(32))])
    assert fold_error(inner, folded(inner, recipe), recipe, tokens, torch.ones_like(tokens)) < 1e-5
    export(inner, recipe, tmp_path / "out")
    again = type(inner).from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(again(tokens).logits, folded(inner, recipe)(tokens).logits)


def wrapped(kind):
    torch.manual_seed(0)
    text = BASE | {"head_dim": 16, "model_type": {"gemma3": "gemma3_text"}.get(kind, "mistral")}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, image_token_index=90)
    return AutoModelForImageTextToText.from_config(config)


def test_what_is_no_causal_model_is_refused_by_a_sentence():
    with pytest.raises(ValueError, match="A LlamaModel has no head over the vocabulary: load it as a causal LM"):
        load(AutoModel.from_config(build("llama").config), tokenizer=build_tokenizer())
    with pytest.raises(ValueError, match="A OptimizedModule is no model of transformers: give the model that was"):
        check_source(torch.compile(build("llama"), backend="eager"))
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge its adapter first, model.merge_and_unload"):
        check_source(adapted)
    with pytest.raises(ValueError, match="A NoneType is no model of transformers: give a hub id, a folder"):
        check_source(None)
