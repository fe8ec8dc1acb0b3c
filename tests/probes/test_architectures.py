"""In every family the residual stream adds up, the heads add up, and both agree with Hugging Face's own account."""

import ast
from pathlib import Path

import pytest
import torch
from families import N_LAYERS, build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from probes.architectures import architecture_of, block_of, o_proj_of
from probes.hooks import captured
from probes.models import load
from probes.sites import Site

STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@torch.no_grad()
def test_the_residual_stream_adds_up(model, tokens):
    sites = [Site(layer, name) for layer in range(N_LAYERS) for name in STREAM]
    with captured(model, sites) as cache:
        model(tokens)
    for layer in range(N_LAYERS):
        x = {name: cache[Site(layer, name)] for name in STREAM}
        torch.testing.assert_close(x["resid_mid"], x["resid_pre"] + x["attn_out"])
        torch.testing.assert_close(x["resid_post"], x["resid_mid"] + x["mlp_out"])


@torch.no_grad()
def test_the_stream_is_that_of_hidden_states(model, tokens):
    with captured(model, [Site(layer, "resid_post") for layer in range(N_LAYERS)]) as cache:
        hidden = model(tokens, output_hidden_states=True).hidden_states
    for layer in range(N_LAYERS - 1):
        torch.testing.assert_close(cache[Site(layer, "resid_post")], hidden[layer + 1])
    norm = model.get_submodule(architecture_of(model).final_norm)
    torch.testing.assert_close(norm(cache[Site(N_LAYERS - 1, "resid_post")]), hidden[-1])
    assert not torch.allclose(cache[Site(N_LAYERS - 1, "resid_post")], hidden[-1], atol=1e-2)


@torch.no_grad()
def test_the_heads_writes_add_up_to_the_output_of_o_proj(model, tokens):
    writes = [Site(1, "result", head) for head in range(4)]
    out = {}
    o_proj = o_proj_of(model, 1)
    handle = o_proj.register_forward_hook(lambda _m, _a, output: out.update(whole=output))
    try:
        with captured(model, writes) as cache:
            model(tokens)
    finally:
        handle.remove()
    bias = 0 if o_proj.bias is None else o_proj.bias
    torch.testing.assert_close(sum(cache[site] for site in writes) + bias, out["whole"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_taps_give_what_the_mlp_reads_and_o_proj_reads(model, tokens):
    with captured(model, [Site(1, "mlp_in"), Site(1, "z"), Site(1, "resid_mid"), Site(1, "z", 2)]) as cache:
        model(tokens)
    block = block_of(model, 1)
    before = cache[Site(1, "resid_mid")]
    expected = before
    for norm in ("pre_feedforward_layernorm", "post_attention_layernorm"):
        if hasattr(block, norm) and model.config.model_type != "olmo2":
            expected = getattr(block, norm)(before)
            break
    torch.testing.assert_close(cache[Site(1, "mlp_in")], expected)
    z = cache[Site(1, "z")]
    width = o_proj_of(model, 1).in_features // 4
    assert torch.equal(cache[Site(1, "z", 2)], z[..., 2 * width : 3 * width])


def test_an_unknown_family_is_refused_by_name():
    config = AutoConfig.for_model("gpt2", vocab_size=97, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="No architecture row for model_type 'gpt2'. Known: deepseek_v3, gemma2"):
        load(AutoModelForCausalLM.from_config(config), tokenizer=build_tokenizer())


def test_hooks_are_registered_in_one_file_only():
    for folder in ("probes", "steer"):
        for path in (Path(__file__).parents[2] / folder).rglob("*.py"):
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            registers = any(name.startswith("register_") and "hook" in name for name in names)
            assert registers == (path.name == "hooks.py" and folder == "probes"), path


def test_probes_never_imports_steer():
    for path in (Path(__file__).parents[2] / "probes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(module.split(".")[0] == "steer" for module in modules), path
