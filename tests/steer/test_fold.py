"""Folding is right when the folded model, run plainly, equals the plain model run with the recipe."""

import copy

import pytest
import torch
from families import POST_NORM, build

from probes.model.architectures import architecture_of, block_of, head_matrices, o_proj_bias, o_proj_of, path_of
from probes.model.hooks import captured
from probes.model.loading import load
from probes.model.sites import Site
from steer.checkpoints.writing import write_model
from steer.deltas import dialled, recipe_delta
from steer.folding._fold import declare_bias, fold, fold_error, folded
from steer.folding.draft import NotFoldable
from steer.interventions.activation import Ablate, Add, Clamp, Rotate, Scale
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied

SITES = ["L1.attn_out", "L1.mlp_out", "L0.mlp_out", "L1.z", "L1H2.z", "L1H2.result", "L1.resid_post"]
KINDS = {
    "add": lambda site, v: Add(site, v, 0.7),
    "ablate": lambda site, v: Ablate(site, v, 0.7),
    "replace": lambda site, v: Ablate(site, v, 1.0, target=0.4),
    "scale": lambda site, v: Scale(site, 0.4),  # noqa: ARG005
}


MLP_BIAS = {"gpt2": "c_proj.bias", "gpt_neox": "dense_4h_to_h.bias"}  # gpt_oss has one for each expert


def names_in(module):
    return dict(module.named_parameters())


def random_vector(model, site):
    d_model, n_heads, d_head = head_matrices(model, site.layer).shape
    width = d_model if site.name != "z" else d_head if site.head is not None else n_heads * d_head
    return torch.randn(width, generator=torch.Generator().manual_seed(2))


def folds(model, kind, site):
    """The table of the design: what has an equal change of weights, without declaring a bias."""
    if site.name == "resid_post":
        return False
    if site.name in ("attn_out", "mlp_out") and model.config.model_type in POST_NORM:
        return False
    if kind in ("ablate", "scale"):
        return True
    if site.name == "mlp_out":
        return f"mlp.{MLP_BIAS.get(model.config.model_type, 'down_proj.bias')}" in names_in(block_of(model, site.layer))
    return "bias" in names_in(o_proj_of(model, site.layer))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SITES)
def test_the_folded_model_equals_the_steered_one(model, tokens, kind, text):
    site = Site.parse(text)
    recipe = Recipe.of(model, [KINDS[kind](site, random_vector(model, site))])
    plain = model(tokens).logits
    with applied(model, recipe):
        steered = model(tokens).logits
    assert not torch.allclose(steered, plain)

    twin = copy.deepcopy(model)
    if folds(model, kind, site):
        fold(twin, recipe)
        torch.testing.assert_close(twin(tokens).logits, steered, atol=1e-5, rtol=1e-4)
        assert fold_error(model, twin, recipe, tokens, torch.ones_like(tokens)) < 1e-5
    else:
        before = {name: value.clone() for name, value in twin.state_dict().items()}
        with pytest.raises(NotFoldable, match=text):
            fold(twin, recipe)
        assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


def test_a_recipe_that_folds_in_part_changes_nothing():
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    good = Ablate(Site(0, "attn_out"), torch.ones(32))
    for bad, words in (
        (Add(Site(2, "resid_post"), torch.ones(32)), "L2.resid_post is not written by one matrix, but by the whole"),
        (Clamp(Site(1, "result", 0), torch.ones(32), low=0.0), "A clamp at L1H0.result is not linear"),
        (Rotate(Site(1, "attn_out"), torch.ones(32)), "A rotate at L1.attn_out is not linear"),
    ):
        with pytest.raises(NotFoldable, match=words):
            fold(model, Recipe.of(model, [good, bad]))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scope", ["prompt", "thinking", "answer"])
def test_weights_know_no_scope(scope):
    model = build("llama")
    with pytest.raises(NotFoldable, match=f"L0.attn_out is changed in scope '{scope}', but weights act on every"):
        fold(model, Recipe.of(model, [Ablate(Site(0, "attn_out"), torch.ones(32))], scope=scope))


@torch.no_grad()
def test_edits_of_one_layer_fold_in_the_order_of_the_forward_pass(tokens):
    """z, then two heads' writes, then attn_out: they share o_proj, and do not commute; listed in another order."""
    model = build("llama+bias")
    v = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    recipe = Recipe.of(
        model,
        [
            Ablate(Site(1, "attn_out"), v[0], target=1.0),
            Ablate(Site(1, "result", 2), v[1], target=0.5),
            Ablate(Site(1, "result", 0), v[2]),
            Add(Site(1, "result", 2), v[3]),
            Ablate(Site(1, "z"), v[4], target=0.3),
        ],
    )
    assert fold_error(model, folded(model, recipe), recipe, tokens, torch.ones_like(tokens)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "smollm3", "olmoe", "qwen3_moe", "gemma2", "gemma3_text", "olmo2", "deepseek_v3"]
)
def test_a_declared_bias_changes_nothing_and_holds_a_shift(family, tokens):
    model = build(family)
    twin = declare_bias(model)
    assert twin.config.attention_bias
    assert o_proj_of(twin, 1).bias is not None
    torch.testing.assert_close(twin(tokens).logits, model(tokens).logits, atol=1e-6, rtol=0)
    recipe = Recipe.of(model, [Ablate(Site(1, "result", 3), torch.ones(32), target=0.5)])
    edited = folded(model, recipe)
    assert fold_error(model, edited, recipe, tokens, torch.ones_like(tokens)) < 1e-5
    assert o_proj_of(model, 1).bias is None


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3", "glm4", "mixtral", "qwen2_moe"])
def test_a_family_that_cannot_declare_a_bias_says_so(family):
    model = build(family)
    with pytest.raises(NotFoldable, match=f"The config of {family} cannot declare a bias for o_proj"):
        folded(model, Recipe.of(model, [Add(Site(1, "result", 0), torch.ones(32))]))


@torch.no_grad()
def test_a_bfloat16_model_is_edited_in_float32_and_rounded_once():
    """Two edits of one matrix: their exact product, rounded once, is what is stored."""
    model = build("llama", dtype=torch.bfloat16)
    u, v = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    twin = folded(model, Recipe.of(model, [Ablate(Site(1, "result", 1), u), Ablate(Site(1, "result", 1), v)]))
    exact = o_proj_of(model, 1).weight.float().clone()
    for w in (u, v):
        unit = w / w.norm()
        exact[:, 8:16] -= torch.outer(unit, unit @ exact[:, 8:16])
    assert torch.equal(o_proj_of(twin, 1).weight, exact.to(torch.bfloat16))


@torch.no_grad()
def test_a_heads_write_is_read_and_edited_in_float32_in_a_bfloat16_model(tokens):
    """What an edit changes is small beside the write: in bfloat16 their difference would be lost."""
    model = build("llama", dtype=torch.bfloat16)
    sites = [Site(1, "result", 1), Site(1, "z", 1)]
    with captured(model, sites) as cache:
        model(tokens)
    exact = cache[sites[1]].float() @ head_matrices(model, 1)[:, 1].float().T
    assert cache[sites[0]].dtype is torch.float32
    torch.testing.assert_close(cache[sites[0]], exact)
    with applied(model, Recipe.of(model, [Ablate(sites[0], torch.ones(32))])):
        assert model(tokens).logits.dtype is torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("target", [0.0, 0.5])
def test_a_folded_model_keeps_the_dtype_of_every_parameter_and_buffer(model, target, tmp_path):
    """bfloat16 weights beside float32 norms, router corrections and frequencies: routing hangs on their last bits."""
    twin = copy.deepcopy(model).to(torch.bfloat16)
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        if "norm" in name or not isinstance(tensor, torch.nn.Parameter):
            tensor.data = tensor.data.float() + 1e-3  # what bfloat16 would round away
    twin = load(twin)
    recipe = Recipe.of(twin, [Ablate(Site(1, "result", 2), torch.ones(32), target=target)])
    if target and o_proj_bias(twin, 1) is None and architecture_of(twin).declares_bias is None:
        with pytest.raises(NotFoldable, match="cannot declare a bias"):
            folded(twin, recipe)
        return
    edited = folded(twin, recipe)
    ours, theirs = (dict((*m.named_parameters(), *m.named_buffers())) for m in (twin, edited))
    added = theirs.keys() - ours.keys()
    assert {theirs[name].dtype for name in added} <= {torch.bfloat16}
    assert all(name.endswith(".bias") for name in added)
    assert {name: theirs[name].dtype for name in ours} == {name: tensor.dtype for name, tensor in ours.items()}
    path = path_of(twin, Site(1, "z"))
    assert {name for name in ours if not torch.equal(theirs[name], ours[name])} <= {f"{path}.weight", f"{path}.bias"}
    write_model(edited, tmp_path)  # which proves that dtypes are as they are in memory


@torch.no_grad()
def test_a_folded_model_shares_what_it_does_not_change(model):
    """And whoever folds or dials the twin changes the twin alone."""
    recipe = Recipe.of(model, [Ablate(Site(1, "result", 2), torch.ones(32))])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = folded(model, recipe)
    ours, theirs = model.state_dict(), twin.state_dict()
    apart = {name for name in ours if ours[name].data_ptr() != theirs[name].data_ptr()}
    assert apart == {f"{path_of(model, Site(1, 'z'))}.weight"}
    other = Recipe.of(twin, [Ablate(Site(0, "result", 1), torch.ones(32))])
    delta = recipe_delta(twin, other)
    fold(twin, other)
    with dialled(twin, delta, 2.0):
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_declared_bias_leaves_the_routing_of_a_bfloat16_model_alone(tokens):
    model = build("deepseek_v3", dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        buffer.data = buffer.data.float() + (1e-4 * torch.arange(len(buffer)) if "correction" in name else 0)
    twin = declare_bias(model)
    assert torch.equal(twin(tokens).logits, model(tokens).logits)
    assert {b.dtype for b in twin.buffers()} == {torch.float32}
