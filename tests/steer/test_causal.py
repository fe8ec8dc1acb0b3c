"""Patching everything is the clean run, patching nothing the corrupted one; a planted circuit is found, alone."""

import numpy as np
import pytest
import torch
from families import MOE, N_LAYERS, build, build_sparse, build_tokenizer
from scipy.stats import binom
from transformers import LlamaConfig, LlamaForCausalLM

from probes.figures import interactions_figure, patching_figure
from probes.model import Site, load, n_heads
from probes.model.architectures import has_site
from probes.model.routers import hook_router
from steer import Add, Recipe, Scale, applied
from steer.causal import (
    Faithfulness,
    ablated,
    attribution_patched,
    estimates,
    interactions,
    logit_difference,
    patched,
)
from steer.causal._ablated import _Controls
from steer.causal.knocking import effects
from steer.causal.parts import named_parts, others_like
from steer.causal.runs import Run, kept, measured
from steer.interventions import Reinforce

CLEAN, CORRUPTED = [9, 33, 12, 70, 45, 6, 81], [9, 33, 80, 70, 13, 6, 81]
METRIC = logit_difference(7, against=8)
LAST = f"L{N_LAYERS - 1}.resid_post"


@torch.no_grad()
def own(model, ids):
    return float(METRIC(model(torch.tensor([ids])).logits[0, -1].float()))


def in_units(found):
    """The metric of each patch: of a random model, two runs may differ by little."""
    return found.corrupted + found.effect.double() * (found.clean - found.corrupted)


def close(left, right):
    torch.testing.assert_close(left.double(), torch.as_tensor(right).double().expand_as(left), atol=1e-5, rtol=0)


def test_patching_everything_is_the_other_run_nothing_its_own_and_a_batch_is_its_rows(model):
    mid = [f"L{N_LAYERS - 1}.resid_mid"] if has_site(model, N_LAYERS - 1, "resid_mid") else []
    for way in ("denoise", "noise"):
        found = patched(model, CLEAN, CORRUPTED, ["L0.resid_pre", LAST, *mid], metric=METRIC, way=way)
        runs = [own(model, CLEAN), own(model, CORRUPTED)]
        assert (found.clean, found.corrupted) == pytest.approx(runs, abs=1e-5)
        close(in_units(found), runs[way == "noise"])
        nothing = patched(model, CLEAN, CORRUPTED, ["L0.resid_pre"], metric=METRIC, way=way, positions=[0, 1, 5, 6])
        close(in_units(nothing), runs[way == "denoise"])
    assert_batched_as_single(model)


def assert_batched_as_single(model):
    pair = (Site(1, "z", n_heads(model) - 1), Site(2, "mlp_out"))
    parts = [Site(1, "z", 0), Site(2, "attn_out"), pair]
    whole, alone = (
        patched(model, CLEAN, CORRUPTED, parts, metric=METRIC, positions=[2, 6], batch_size=size) for size in (64, 1)
    )
    close(in_units(whole), in_units(alone))
    assert float(in_units(whole).std()) > 1e-4


def test_all_heads_of_a_layer_together_are_its_z_and_a_result_is_its_z():
    model = build("qwen3")
    heads = tuple(Site(1, "z", head) for head in range(n_heads(model)))
    each = patched(model, CLEAN, CORRUPTED, ["L1.z"], metric=METRIC, positions="each")
    with pytest.raises(ValueError, match="L1.z was patched at 7 positions: read a row of `effect`"):
        each["L1.z"]
    with pytest.raises(KeyError, match="'L9.z' was not patched. Known: L1.z"):
        each["L9.z"]
    found = patched(model, CLEAN, CORRUPTED, [heads, "L1.z", "L1H2.z", "L1H2.result"], metric=METRIC).effect[:, 0]
    assert found[0] == pytest.approx(float(found[1]), abs=1e-6)
    assert found[2] == pytest.approx(float(found[3]), abs=1e-6)


@pytest.mark.parametrize("family", [*MOE, "glm4_moe"])
def test_what_enters_the_experts_and_their_choice_are_all_that_the_block_needs(family):
    model = build_sparse(family)
    both = patched(model, CLEAN, CORRUPTED, [("L2.mlp_in", "L2.routing"), "L2.mlp_out"], metric=METRIC)
    close(in_units(both)[0], in_units(both)[1])
    choice = patched(model, CLEAN, CORRUPTED, ["L1.routing", "L2.routing"], metric=METRIC, positions="each")
    routing = kept(model, CLEAN, [Site(1, "routing")]).at[Site(1, "routing")]
    whole = patched(model, CLEAN, CORRUPTED, ["L1.routing"], metric=METRIC)
    with hook_router(model, 1, edit=lambda _: routing):
        assert float(in_units(whole)) == pytest.approx(own(model, CORRUPTED), abs=1e-5)
    close(in_units(choice)[:, [0, 1]], choice.corrupted)  # before the prompts differ
    assert (in_units(choice) - choice.corrupted).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2", "granite", "gpt_neox", "gpt_oss"])
def test_the_gradient_is_that_of_a_small_patch(family):
    """Against the exact effect of a thousandth of the change, which an Add of it makes."""
    model = build(family)
    sites = [Site(1, "resid_mid"), Site(1, "z", 2), Site(2, "mlp_out"), Site(0, "resid_post")]
    sites = sites[1:] if family in ("cohere2", "gpt_neox") else sites
    fast = attribution_patched(model, CLEAN, CORRUPTED, sites, metric=METRIC, positions=[2, 4, 6])
    assert fast.effect.shape == (len(sites), 3)
    with torch.no_grad():
        for site, row in zip(sites, fast.effect, strict=True):
            exact = small(model, site, 4)
            assert float(row[1]) == pytest.approx(exact, rel=0.05, abs=2e-3)


def small(model, site, position, share=1e-2):
    """The effect of a small share of a patch, by finite difference, as the whole patch's."""
    clean, corrupted = (kept(model, ids, [site]) for ids in (CLEAN, CORRUPTED))
    change = torch.zeros_like(clean.at[site])
    change[position] = share * (clean.at[site] - corrupted.at[site])[position]
    runs = [Run(tuple(CORRUPTED), ((site, lambda x, sign=sign: x + sign * change),), METRIC) for sign in (1, -1)]
    up, down = measured(model, runs, batch_size=2).tolist()
    return (up - down) / 2 / share / float(METRIC(clean.logits) - METRIC(corrupted.logits))


def test_faithfulness_tells_how_an_approximation_agrees():
    model = build("llama")
    heads = [Site(layer, "z", head) for layer in range(N_LAYERS) for head in range(4)]
    exact = patched(model, CLEAN, CORRUPTED, heads, metric=METRIC, positions="each")
    fast = attribution_patched(model, CLEAN, CORRUPTED, heads, metric=METRIC, positions="each")
    itself, other = Faithfulness.of(exact, exact), Faithfulness.of(fast, exact)
    assert (itself.pearson, itself.spearman, itself.sign_agreement) == pytest.approx((1, 1, 1))
    assert other.n == len(heads) * len(CLEAN)
    assert 0.3 < other.pearson < 1
    last = [Site(N_LAYERS - 1, "resid_post")]
    whole = attribution_patched(model, CLEAN, CORRUPTED, last, metric=METRIC)
    assert Faithfulness.of(whole, whole).pearson != Faithfulness.of(whole, whole).pearson  # one number has none
    with pytest.raises(ValueError, match="These are patchings of other parts"):
        Faithfulness.of(fast, whole)


def test_a_model_of_linear_parts_is_attributed_exactly():
    """Without norms' and MLPs' bends the metric is linear in the last stream: the approximation is exact there."""
    model = build("llama")
    site = [Site(N_LAYERS - 1, "resid_post")]
    model.model.norm.forward = lambda x: x
    exact = patched(model, CLEAN, CORRUPTED, site, metric=METRIC)
    fast = attribution_patched(model, CLEAN, CORRUPTED, site, metric=METRIC)
    torch.testing.assert_close(fast.effect, exact.effect, atol=1e-5, rtol=0)


REFUSED = [
    (("L1.attn_out",), CLEAN[:-1], "The clean prompt has 7 tokens, and the corrupted one 6"),
    (("L1.attn_out",), CLEAN, "on both runs: there is nothing that a patch could restore"),
    (("L1.attn_out", "L1.attn_out"), CORRUPTED, "Two parts are named 'L1.attn_out'"),
    ((), CORRUPTED, "No part was given"),
    (("L1.pattern",), CORRUPTED, "who attends to whom, which is never held whole"),
    ((Scale(Site(1, "attn_out")),), CORRUPTED, "scale at L1.attn_out is no site"),
    (("L0E1.routing",), CORRUPTED, "L0E1.routing is one expert's weight: patch the choice, L0.routing"),
]


@pytest.mark.parametrize(("parts", "corrupted", "fault"), REFUSED)
def test_what_cannot_be_patched_is_refused(parts, corrupted, fault):
    with pytest.raises(ValueError, match=fault):
        patched(build_sparse("mixtral"), CLEAN, corrupted, parts, metric=METRIC)


def test_a_choice_has_no_gradient_and_no_mean_and_a_lonely_prompt_no_donor():
    model = build_sparse("mixtral")
    with pytest.raises(ValueError, match="L1.routing is a choice, and has no gradient"):
        attribution_patched(model, CLEAN, CORRUPTED, ["L1.routing"], metric=METRIC)
    for kind, parts, fault in (
        ("mean", ["L1E2.routing"], "is a choice, and has no mean"),
        ("resample", ["L1E2.routing"], "is one expert's weight, which means nothing beside another"),
        ("resample", ["L1.z"], "No reference stands in for a prompt of 7 tokens"),
    ):
        with pytest.raises(ValueError, match=fault):
            ablated(model, [CLEAN], parts, metric=METRIC, kind=kind)
    with pytest.raises(ValueError, match="2 metrics came with 1 prompts"):
        ablated(model, [CLEAN], ["L1.z"], metric=[METRIC, METRIC])
    with pytest.raises(ValueError, match="Effects are measured on prompts, but none was given"):
        ablated(model, [], ["L1.z"], metric=METRIC)
    with pytest.raises(ValueError, match="Parts interact in pairs"):
        interactions(model, [CLEAN], ["L1.z"], metric=METRIC)


@pytest.mark.parametrize(
    "family", ["llama", "phi3", "gemma2", "cohere2", "granite", "gpt2", "gpt_neox", "gpt_oss", "deepseek_v3"]
)
def test_a_head_that_is_zeroed_is_one_that_is_scaled_to_nothing(family):
    """Prompts of two lengths, and parts of several kinds, in one call."""
    model, head = build(family), Site(1, "z", 1)
    prompts = [CLEAN, CORRUPTED, CLEAN[:4]]
    found = ablated(model, prompts, {"zero": head, "scaled": Scale(head, 0.0)}, metric=METRIC, controls=3)
    np.testing.assert_allclose(found.effect[:, 0], found.effect[:, 1], atol=1e-5)
    np.testing.assert_allclose(found.plain, [own(model, ids) for ids in prompts], atol=1e-5)
    assert np.isnan(found.random[:, 1]).all()  # an intervention has no others
    assert not np.isnan(found.random[:, 0]).any()


def test_a_mean_and_another_prompts_activation_stand_in():
    model, site = build("llama"), Site(1, "attn_out")
    reference = [CORRUPTED, [5, *CORRUPTED[1:]]]
    mean = torch.stack([kept(model, ids, [site]).at[site][1:].mean(0) for ids in reference]).mean(0)
    whole = {key: (site,) for key in ("mean", "resample")}
    for kind in whole:
        found = ablated(model, [CLEAN], [site], metric=METRIC, kind=kind, reference=reference, controls=0)
        donors = [mean.expand(7, -1)] if kind == "mean" else [kept(model, ids, [site]).at[site] for ids in reference]
        runs = [Run(tuple(CLEAN), ((site, lambda _, value=value: value),), METRIC) for value in donors]
        expected = measured(model, runs, batch_size=1).numpy() - own(model, CLEAN)
        assert np.abs(expected - found.effect[0, 0]).min() < 1e-5


@pytest.mark.parametrize("family", [*MOE])
def test_an_expert_that_is_knocked_out_is_one_reinforced_by_nothing(family):
    model = build_sparse(family)
    experts = others_like(model, Site(2, "routing", expert=0))
    found = ablated(model, [CLEAN], experts, metric=METRIC, controls=0)
    for column, site in enumerate(experts[-4:], start=len(experts) - 4):
        with applied(model, Recipe.of(model, [Reinforce(site, 0.0)]), must_fire=False):
            expected = own(model, CLEAN) - found.plain[0]
        assert found.effect[0, column] == pytest.approx(expected, abs=1e-5)


def test_controls_are_as_many_others_of_the_kind():
    model = build("llama")
    parts = named_parts(model, [("L0H1.z", "L2H3.z"), "L1H0.result"])
    drawn = _Controls(model, 10, 0)
    for members in parts.values():
        others = drawn.like(members)
        assert len(others) >= 5
        for other in others:
            assert len(set(other)) == len(members)
            assert not set(other) & set(members)
            assert all(site.name == "z" and site.head is not None for site in other)


def planted(seed=0):
    """A random model in which heads 1 and 3 of layer 0 together make the next token 7, and neither alone.

    They look at all tokens alike; 1 copies a mark of token 90, 3 one of 91, into the stream. The MLP of layer 1
    multiplies the two marks, and the unembedding of 7 reads the product. All else reads and writes other dimensions;
    a large constant keeps the norms' scale, by which all parts would meet, where it is.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    a, b, seen_a, seen_b, both, constant = own = range(6)
    for name, matrix in model.named_parameters():
        if matrix.dim() == 2:
            reads = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight",
                                   "up_proj.weight", "lm_head.weight", "embed_tokens.weight"))  # fmt: skip
            matrix.data[(slice(None), own) if reads else own] = 0
    embed, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embed[:, len(own) :].normal_(0, 2)
    embed[90:92] = 0
    embed[:, constant] = 40
    head *= 3
    embed[90, a] = embed[91, b] = 20
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    for number, mark, seen in ((1, a, seen_a), (3, b, seen_b)):
        at = slice(8 * number, 8 * number + 8)
        attention.q_proj.weight.data[at] = attention.v_proj.weight.data[at] = 0
        attention.o_proj.weight.data[:, at] = 0
        attention.v_proj.weight.data[at.start, mark] = attention.o_proj.weight.data[seen, at.start] = 4
    for matrix, seen in ((mlp.gate_proj, seen_a), (mlp.up_proj, seen_b)):
        matrix.weight.data[0] = 0
        matrix.weight.data[0, seen] = 2
    mlp.down_proj.weight.data[:, 0] = 0
    mlp.down_proj.weight.data[both, 0] = 4
    head[7, both] = 1
    return load(model, tokenizer=build_tokenizer())


HEADS = [Site(layer, "z", head) for layer in range(2) for head in range(4)]
PLANTED = {"L0H1.z", "L0H3.z"}


def prompts(count, seed=0):
    """Random tokens, among them one 90 and one 91; and the same without these two."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(10, 90, (count, 8), generator=generator)
    corrupted = clean.clone()
    clean[:, 2], clean[:, 5] = 90, 91
    return clean.tolist(), corrupted.tolist()


def test_patching_finds_a_planted_circuit():
    model = planted()
    (clean,), (corrupted,) = prompts(1)
    both = tuple(site for site in HEADS if str(site) in PLANTED)
    found = patched(model, clean, corrupted, [*HEADS, both], metric=METRIC)
    assert float(found.effect[-1]) == pytest.approx(1, abs=0.1)  # both bring it back
    assert found.effect[:-1].abs().max() < 0.1  # no head alone does
    lost = patched(model, clean, corrupted, HEADS, metric=METRIC, way="noise")
    assert {name for name, effect in zip(lost.names, lost.effect[:, 0], strict=True) if effect < 0.5} == PLANTED
    assert {row[0] for row in lost.table(2).rows} == PLANTED


@pytest.mark.parametrize("seed", range(3))
def test_the_map_of_interactions_shows_the_planted_pair_and_nothing_else(seed):
    model = planted(seed)
    clean, _ = prompts(24, seed)
    found = interactions(model, clean, HEADS, metric=METRIC)
    assert found.found() == [("L0H1.z", "L0H3.z")]
    sizes = np.sort(np.abs(found.estimates.mean))
    assert sizes[-1] > 1000 * sizes[-2]
    assert found.found(least=0.9) == []
    assert len(found.figure().layout.shapes) == 2
    swept = ablated(model, clean, HEADS, metric=METRIC, controls=7)
    assert set(swept.found()) == PLANTED
    assert swept.found(least=0.9) == []


def test_parts_that_add_up_do_not_interact():
    """Two vectors added to the last stream, where a linear metric reads it."""
    model = build("llama")
    model.model.norm.forward = lambda x: x
    site, generator = Site(N_LAYERS - 1, "resid_post"), torch.Generator().manual_seed(0)
    adds = {name: Add(site, torch.randn(32, generator=generator)) for name in "ab"}
    found = interactions(model, [CLEAN, CORRUPTED], adds, metric=METRIC)
    assert np.abs(found.single).min() > 1e-3
    np.testing.assert_allclose(found.interaction, 0, atol=1e-4)


def test_effects_are_those_of_plain_runs_whatever_the_batch():
    model = build("llama")
    groups = [(site,) for site in (Site(0, "mlp_out"), Site(1, "z", 3))]
    words = {"metric": METRIC, "kind": "zero", "reference": (), "seed": 0}
    plain, one = effects(model, [CLEAN, CORRUPTED], groups, batch_size=1, **words)
    _, many = effects(model, [CLEAN, CORRUPTED], groups, batch_size=64, **words)
    np.testing.assert_allclose(plain, [own(model, CLEAN), own(model, CORRUPTED)], atol=1e-5)
    for key in one:
        np.testing.assert_allclose(one[key], many[key], atol=1e-5)


@pytest.mark.parametrize(("n", "law"), [(12, "normal"), (20, "normal"), (20, "t")])
def test_of_null_draws_a_false_find_is_as_rare_as_stated(n, law):
    """200 maps of 28 pairs in which nothing is there: a share of at most 5 % finds anything, but for chance."""
    rng, draws, hits, tested = np.random.default_rng(n), 200, 0, []
    for draw in range(draws):
        noise = rng.normal(size=(n, 28)) if law == "normal" else rng.standard_t(2, size=(n, 28))
        found = estimates(noise, draws=4_000, seed=draw)
        hits += bool((found.q <= 0.05).any())
        tested.append((found.p <= 0.05).mean())
    assert hits <= binom.ppf(0.999, draws, 0.05)
    assert np.mean(tested) == pytest.approx(0.05, abs=0.012)


def test_an_interval_holds_the_mean_about_as_often_as_stated():
    rng = np.random.default_rng(3)
    found = estimates(rng.normal(0.5, 1, size=(30, 1000)), draws=500)
    assert 0.91 < ((found.low <= 0.5) & (found.high >= 0.5)).mean() < 0.96
    assert found.q.min() >= found.p.min()


def test_p_is_that_of_all_flips_and_of_too_few_prompts_nothing_is_found():
    one = estimates(np.ones((5, 1)))
    assert one.p[0] == pytest.approx(2 / 2**5)
    assert estimates(np.zeros((8, 1))).p[0] == 1
    many = estimates(np.ones((30, 1)), draws=999)
    assert many.p[0] == pytest.approx(1 / 1000)
    single = estimates(np.ones((1, 2)))
    assert single.p.tolist() == [1, 1]
    assert np.isnan(single.low).all()
    gap = estimates(np.array([[np.nan, 1.0]] * 8))
    assert np.isnan(gap.q[0])
    assert gap.q[1] == gap.p[1]


def test_figures_name_what_they_show():
    figure = patching_figure([[0.5, float("nan")]], ["L0"], ["<a>", "b"])
    assert list(figure.data[0].z[0]) == [0.5, None]
    assert figure.layout.xaxis.ticktext == ("&lt;a&gt;", "b")
    assert figure.layout.yaxis.title.text == "site"
    figure = interactions_figure([[None, -2.0], [-2.0, None]], ["a", "b"], found=[(0, 1)], unit="logits")
    assert (figure.data[0].zmin, figure.data[0].zmax, len(figure.layout.shapes)) == (-2, 2, 2)
    assert figure.data[0].colorbar.title.text == "logits"
