"""Blocks of several kinds in one model: each has the sites that are there, and refuses the others by layer and name."""

import pytest
import torch
from families import build_tokenizer
from tiny import tiny_model

from probes import Site, attached, captured, direction_between, head_writes, load
from probes.model import n_heads, n_layers, path_of, sites_in
from probes.model.architectures import architecture_of, row_at
from probes.thinking import Span
from steer import Ablate, Add, NotFoldable, Recipe, Scope, Step, applied, folded
from steer.folding._fold import fold_error

IDS = torch.tensor([[7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18]])
V = torch.randn(32, generator=torch.Generator().manual_seed(3))
# Which layers of the tiny model have heads, and which have a stream between.
HYBRIDS = {
    "qwen3_next": ([1], [0, 1, 2]), "qwen3_5_text": ([1], [0, 1, 2]), "qwen3_5_moe_text": ([1], [0, 1, 2]),
    "lfm2_moe": ([1], [0, 1, 2]), "falcon_h1": ([0, 1, 2], [0, 1, 2]), "jamba": ([1], [0, 1, 2]),
    "granitemoehybrid": ([1], [0, 1, 2]), "nemotron_h": ([2], []), "mamba2": ([], []),
    "minimax": ([0, 1, 2], [0, 1, 2]), "bamba": ([1], [0, 1, 2]), "olmo_hybrid": ([2], [0, 1, 2]),
}  # fmt: skip


def tiny(model_type):
    return load(tiny_model(model_type), tokenizer=build_tokenizer())


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_every_layer_has_the_sites_that_are_there(model_type):
    model = tiny(model_type)
    with_heads, with_mid = HYBRIDS[model_type]
    assert [layer for layer in range(n_layers(model)) if n_heads(model, layer)] == with_heads
    for name, layers in (("z", with_heads), ("resid_mid", with_mid)):
        if layers:
            assert [site.layer for site in sites_in(model, name)] == layers
        else:
            with pytest.raises(ValueError, match="Layer 0 of this .* has no "):
                sites_in(model, name)
    for layer in set(range(n_layers(model))) - set(with_heads):
        named = f"Layer {layer} of this .* has no attention heads that can be told apart. "
        named += f"The layers that have: {', '.join(map(str, with_heads))}." if with_heads else "No layer has."
        for site in (Site(layer, "z"), Site(layer, "result", 0)):
            with pytest.raises(ValueError, match=named), captured(model, [site]):
                pass
    for layer in set(range(n_layers(model))) - set(with_mid):
        with pytest.raises(ValueError, match=f"Layer {layer} of this .* has no resid_mid: no module of its block"):
            path_of(model, Site(layer, "resid_mid"))


@pytest.mark.parametrize("model_type", ["phi", "qwen3_next", "falcon_h1", "olmo3", "minimax", "gemma4_text", "falcon"])
def test_the_same_row_is_found_in_bfloat16(model_type):
    whole, half = (tiny_model(model_type).to(dtype) for dtype in (torch.float32, torch.bfloat16))
    rows = [architecture_of(load(model, tokenizer=build_tokenizer())) for model in (whole, half)]
    assert rows[0] == rows[1]


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["falcon_h1", "minimax", "qwen3_next", "granitemoehybrid"])
def test_a_stream_that_is_edited_between_stays_edited(model_type):
    """Whatever writes beside attention: what is added at `resid_mid` is added to the block's output, and to what the
    MLP reads, as plain hooks of torch do it."""
    model = tiny(model_type)
    row, block = row_at(model, 1), model.get_submodule(f"{architecture_of(model).layers}.1")
    with attached(model, Site(1, "resid_mid"), lambda x: x + V):
        ours = model(IDS, use_cache=False).logits
    mixer = {"falcon_h1": "mamba", "minimax": "self_attn"}.get(model_type, row.taps.get("attn_in", None))
    mixer = mixer if isinstance(mixer, str) else mixer.path
    scale = 1 / (getattr(model.config, "residual_multiplier", 1) or 1)
    shift = lambda _m, _a, out: (out[0] + V * scale, *out[1:]) if isinstance(out, tuple) else out + V * scale  # noqa: E731
    handle = block.get_submodule(mixer).register_forward_hook(shift)
    theirs = model(IDS, use_cache=False).logits
    handle.remove()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, model(IDS, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "qwen3_next", "nemotron_h", "falcon_h1"])
def test_a_scope_counts_on_where_only_a_state_is_kept(model_type):
    """Positions of thinking that lie beyond the prompt are found, though a cache of states tells no length."""
    model = tiny(model_type)
    ids = torch.tensor([[7, 3, 8, 9]])
    steps = (Step(Add(Site(1, "resid_post"), V, 0.5), Scope("thinking", window=(3, 5))),)
    recipe = Recipe(steps, Recipe.of(model, []).model)
    with applied(model, recipe) as log:
        model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, suppress_tokens=list(range(6)))
    assert log.positions() == [[4, 5]]  # beyond the prompt, where the thinking began


def test_a_cache_of_states_that_is_not_empty_is_refused_by_a_scope():
    model = tiny("mamba2")
    with torch.no_grad():
        cache = model(IDS, use_cache=True).cache_params
        with (
            applied(model, Recipe.of(model, [Add(Site(1, "resid_post"), V, 0.5)]), must_fire=False),
            pytest.raises(ValueError, match="cannot tell how many tokens are in a cache of states alone"),
        ):
            model(IDS[:, :1], cache_params=cache, use_cache=True)


@torch.no_grad()
def test_what_a_family_overwrites_in_place_is_read_as_it_was():
    """Falcon adds attention's output to the MLP's, in the MLP's own memory."""
    model = tiny("falcon")
    assert row_at(model, 1).overwritten == {"mlp_out"}
    names = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    with captured(model, [Site(1, name) for name in names]) as cache:
        model(IDS, use_cache=False)
    x = {site.name: value for site, value in cache.items()}
    torch.testing.assert_close(x["resid_post"], x["resid_pre"] + x["attn_out"] + x["mlp_out"])


@torch.no_grad()
def test_rows_that_a_family_lays_one_after_another_are_read_and_steered_by_row():
    """OPT's MLP reads [batch * pos, d_model]."""
    model = tiny("opt")
    with captured(model, sites_in(model, "mlp_out")) as cache:
        model(IDS, use_cache=False)
    assert {x.shape for x in cache.values()} == {(2, 6, 32)}
    first = torch.zeros(2, 6, 1)
    first[0] = 1
    with attached(model, Site(1, "mlp_out"), lambda x: x + first * V):
        one = model(IDS, use_cache=False).logits
    plain = model(IDS, use_cache=False).logits
    torch.testing.assert_close(one[1], plain[1])
    assert not torch.allclose(one[0], plain[0])


def test_directions_heads_and_folds_on_a_hybrid():
    model = tiny("qwen3_next")
    direction = direction_between(model, ["w7 w8 w9"], ["w10 w11"], "L0.attn_out")
    assert direction.vector.shape == (32,)
    writes = head_writes(model, [Span(tuple(range(6, 12)), 0, 6)], dict.fromkeys(range(3), V))
    assert writes.isnan().all(1).tolist() == [True, False, True]
    recipe = Recipe.of(model, [Ablate(Site(1, "result", 2), V)])
    assert fold_error(model, folded(model, recipe), recipe, IDS, torch.ones_like(IDS)) < 1e-5
    with pytest.raises(NotFoldable, match="L0.attn_out is written by matrices that no row names for qwen3_next"):
        folded(model, Recipe.of(model, [Ablate(Site(0, "attn_out"), V)]))


def test_a_model_without_heads_says_so_where_heads_are_asked_for():
    with pytest.raises(ValueError, match="Layer 0 of this mamba has no attention heads that can be told apart. No la"):
        head_writes(tiny("mamba"), [Span(tuple(range(6, 12)), 0, 6)], {0: V})
