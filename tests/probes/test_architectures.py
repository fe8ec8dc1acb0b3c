"""In every family the residual stream adds up, the heads add up, and both agree with Hugging Face's own account."""

import ast
from pathlib import Path

import pytest
import torch
from families import FAMILIES, N_LAYERS, PARALLEL, build

from probes.model.architectures import architecture_of, block_of, is_parallel, o_proj_of, tap_of
from probes.model.hooks import captured
from probes.model.sites import Site

STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@torch.no_grad()
def test_the_residual_stream_adds_up(model, tokens):
    parallel = is_parallel(model)
    names = [name for name in STREAM if not (parallel and name == "resid_mid")]
    with captured(model, [Site(layer, name) for layer in range(N_LAYERS) for name in names]) as cache:
        model(tokens)
    for layer in range(N_LAYERS):
        x = {name: cache[Site(layer, name)] for name in names}
        if parallel:
            torch.testing.assert_close(x["resid_post"], x["resid_pre"] + x["attn_out"] + x["mlp_out"])
        else:
            torch.testing.assert_close(x["resid_mid"], x["resid_pre"] + x["attn_out"])
            torch.testing.assert_close(x["resid_post"], x["resid_mid"] + x["mlp_out"])


@pytest.mark.parametrize("family", [*FAMILIES])
def test_a_parallel_block_has_no_stream_between_and_says_so(family):
    model = build(family)
    if family in PARALLEL:
        with pytest.raises(ValueError, match=f"{family} has no resid_mid: attention and MLP read the same stream"):
            tap_of(model, Site(0, "resid_mid"))
    else:
        assert tap_of(model, Site(0, "resid_mid"))[1].side == "input"


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
    bias = dict(o_proj.named_parameters()).get("bias", 0)
    torch.testing.assert_close(sum(cache[site] for site in writes) + bias, out["whole"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_taps_give_what_the_mlp_reads_and_o_proj_reads(model, tokens):
    """Attention and MLP read the normed stream before them (OLMo 2: the stream itself); a head's z is a slice."""
    stream = Site(1, "resid_pre" if is_parallel(model) else "resid_mid")
    with captured(
        model, [Site(1, "attn_in"), Site(1, "resid_pre"), Site(1, "mlp_in"), Site(1, "z"), stream, Site(1, "z", 2)]
    ) as cache:
        model(tokens)
    norm = {"olmo2": None, "gpt2": "ln_2", "cohere2": "input_layernorm"}
    sandwich = model.config.model_type in ("gemma2", "gemma3_text")
    name = norm.get(model.config.model_type, "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm")
    expected = cache[stream] if name is None else block_of(model, 1).get_submodule(name)(cache[stream])
    torch.testing.assert_close(cache[Site(1, "mlp_in")], expected)
    first = {"olmo2": None, "gpt2": "ln_1"}.get(model.config.model_type, "input_layernorm")
    before = cache[Site(1, "resid_pre")]
    torch.testing.assert_close(
        cache[Site(1, "attn_in")], before if first is None else block_of(model, 1).get_submodule(first)(before)
    )
    width = cache[Site(1, "z")].shape[-1] // 4
    assert torch.equal(cache[Site(1, "z", 2)], cache[Site(1, "z")][..., 2 * width : 3 * width])


def test_hooks_are_registered_in_one_file_only():
    for folder in ("probes", "steer"):
        for path in (Path(__file__).parents[2] / folder).rglob("*.py"):
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            registers = any(name.startswith("register_") and "hook" in name for name in names)
            assert registers == (path.name == "passes.py" and folder == "probes"), path


def test_probes_never_imports_steer():
    for path in (Path(__file__).parents[2] / "probes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(module.split(".")[0] == "steer" for module in modules), path
