"""The logit lens ends in the model's own logits, and what the parts of a model wrote sums to a logit."""

import pytest
import torch
from families import D_VOCAB, FAMILIES, MOE, N_LAYERS, UNLISTED_MOE, build, build_sparse, build_tokenizer
from tiny import tiny_model

from probes.figures import lens_figure
from probes.lens import direct_logit_attribution, logit_lens, token_ids
from probes.lens.frozen import FrozenNorm
from probes.lens.unembedding import Unembedding
from probes.model import Site, load, n_heads
from probes.model.hooks import attached, captured
from steer import Add, Recipe, applied

DENSE_FIRST = ("qwen3_moe", "deepseek_v3", "glm4_moe", "ernie4_5_moe")  # whose first block is not sparse
IDS = [9, 33, 12, 70, 45, 6, 81]


@torch.no_grad()
def own(model, ids=IDS):
    return model(torch.tensor([ids])).logits[0].float()


def assert_ends_in_the_logits(model):
    lens, logits = logit_lens(model, IDS, k=D_VOCAB), own(model)
    last = torch.zeros(len(IDS), D_VOCAB).scatter(1, lens.top[-1], lens.probability[-1])
    torch.testing.assert_close(last.log(), logits.log_softmax(-1), atol=1e-4, rtol=0)
    following = torch.tensor(IDS[1:])[:, None]
    expected = logits.log_softmax(-1)[:-1].gather(1, following)
    torch.testing.assert_close(lens.log_probability[-1, :-1], expected, atol=1e-4, rtol=0)
    ranks = (logits[:-1] > logits[:-1].gather(1, following)).sum(1)
    assert lens.rank[-1, :-1, 0].tolist() == ranks.tolist()
    assert lens.rank[0, -1, 0] == -1
    assert lens.log_probability[0, -1, 0].isnan()


def test_a_row_of_the_lens_is_the_norm_and_the_unembedding_of_that_stream():
    model = build("gemma2")
    with captured(model, [Site(1, "resid_mid")]) as cache:
        own(model)
    lens = logit_lens(model, IDS, sites=["L1.resid_mid"], tokens=[7, 8], positions=[2, -1], k=3)
    with torch.no_grad():
        raw = model.lm_head(model.model.norm(cache[Site(1, "resid_mid")][0, [2, 6]]))
    cap = model.config.final_logit_softcapping
    expected = (cap * torch.tanh(raw / cap)).log_softmax(-1)
    assert lens.read == (2, 6)
    assert lens.top[0].tolist() == expected.topk(3).indices.tolist()
    torch.testing.assert_close(lens.log_probability[0], expected[:, [7, 8]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lens.probability[0], expected.topk(3).values.exp(), atol=1e-5, rtol=1e-5)


def test_positions_read_a_few_at_a_time_are_those_read_at_once(monkeypatch):
    model = build("llama")
    whole = logit_lens(model, IDS)
    monkeypatch.setattr("probes.lens._logit_lens._NUMBERS", 2 * D_VOCAB)
    parts = logit_lens(model, IDS)
    for name in ("top", "rank"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    torch.testing.assert_close(whole.log_probability, parts.log_probability, equal_nan=True)


def test_a_steered_model_is_read_as_it_is_steered():
    model = build("qwen3")
    recipe = Recipe.of(model, [Add(Site(1, "resid_post"), torch.ones(32), 3.0)])
    plain = logit_lens(model, IDS).log_probability[-1]
    with applied(model, recipe):
        assert_ends_in_the_logits(model)
        rest = {part.name: part.value for part in assert_sums(model).parts if "rest" in part.name}
        assert abs(rest["L1 rest"]) > 0.01
        assert rest["L0 rest"] == pytest.approx(0, abs=1e-5)
        assert (logit_lens(model, IDS).log_probability[-1] - plain)[:-1].abs().max() > 0.1


def test_what_is_no_stream_and_what_is_no_token_is_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="L1.attn_out is not the stream, which a lens reads"):
        logit_lens(model, IDS, sites=["L1.attn_out"])
    with pytest.raises(ValueError, match="There is no token to read"):
        token_ids(model, [])


def test_logits_that_are_not_the_unembedding_of_the_stream_are_refused():
    model = build("llama")
    with captured(model, [Site(2, "resid_post")]) as cache:
        logits = own(model)
    stream = cache[Site(2, "resid_post")][0]
    assert Unembedding.of(model, stream, logits).factor == 1.0
    assert Unembedding.of(model, stream, 0.25 * logits).factor == pytest.approx(0.25, rel=1e-5)
    with pytest.raises(ValueError, match="The logits of this llama are not its unembedding"):
        Unembedding.of(model, stream, logits.flip(-1))


@torch.no_grad()
@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(6), torch.nn.RMSNorm(6), torch.nn.LayerNorm(5), None])
def test_a_frozen_norm_is_the_norm_where_it_was_frozen(norm):
    torch.manual_seed(0)
    x, v = torch.randn(2, 5 if norm is not None and norm.normalized_shape == (5,) else 6)
    for parameter in () if norm is None else norm.parameters():
        torch.nn.init.normal_(parameter)
    frozen = FrozenNorm.of(norm, x)
    expected = float(v.double() @ (x if norm is None else norm(x)).double())
    got = float(frozen.back(v.double()) @ x.double() + v.double() @ frozen.bias)
    assert got == pytest.approx(expected, abs=1e-5)


def assert_sums(model, *, against=8, position=-1):
    found = direct_logit_attribution(model, IDS, 7, against=against, position=position)
    logits = own(model)[position]
    expected = float(logits[7] - (0 if against is None else logits[against]))
    assert found.total == pytest.approx(expected, abs=1e-4)
    assert sum(part.value for part in found.parts) == pytest.approx(expected, abs=1e-4)
    return found


def test_the_lens_ends_in_the_logits_and_what_the_parts_wrote_sums_to_them(model):
    assert_ends_in_the_logits(model)
    found = assert_sums(model)
    assert_sums(model, against=None, position=3)
    scores = found.heads().scores
    assert scores.shape == (N_LAYERS, n_heads(model))
    assert not scores.isnan().any()


@pytest.mark.parametrize("family", [*MOE, *UNLISTED_MOE])
def test_experts_are_parts_of_their_own(family):
    model = build_sparse(family)
    if family in UNLISTED_MOE:
        assert_ends_in_the_logits(model)
    found = assert_sums(model)
    names = [part.name for part in found.parts]
    assert sum(part.layer == 2 and part.expert is not None for part in found.parts) == 2
    shared = "shared" in " ".join(name for name, _ in model.named_parameters())
    assert ("L2 shared" in names) == shared
    assert ("L0.mlp_out" in names) == (model.config.model_type in DENSE_FIRST)


@pytest.mark.parametrize("family", ["mamba", "jamba", "falcon_h1", "olmo", "gemma", "inkling_text"])
def test_layers_without_heads_have_parts_too(family):
    assert_sums_of_any(load(tiny_model(family), tokenizer=build_tokenizer()))


def assert_sums_of_any(model):
    found = direct_logit_attribution(model, IDS[:5], 7, against=8)
    logits = own(model, IDS[:5])[-1]
    assert sum(part.value for part in found.parts) == pytest.approx(float(logits[7] - logits[8]), abs=1e-4)


def test_an_unembedding_that_is_more_than_a_matrix_is_refused():
    with pytest.raises(ValueError, match="The logits of this modernbert-decoder are not its unembedding"):
        logit_lens(load(tiny_model("modernbert-decoder"), tokenizer=build_tokenizer()), IDS)


def test_parts_that_do_not_add_up_are_refused(monkeypatch):
    monkeypatch.setattr("probes.lens.contributions.multiplier_of", lambda _: 0.5)
    with pytest.raises(ValueError, match="What the parts of this llama wrote does not add up to its logit"):
        direct_logit_attribution(build("llama"), IDS, 7)


def test_a_stream_that_norms_rewrite_is_refused():
    with pytest.raises(ValueError, match="what goes on in the stream is what norms put out"):
        direct_logit_attribution(load(tiny_model("minimax"), tokenizer=build_tokenizer()), IDS[:5], 7)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_head_adds_its_write_through_the_frozen_norm(family):
    model = build(family)
    head, last = Site(1, "result", 2), Site(N_LAYERS - 1, "resid_post")
    write = []
    with captured(model, [last]) as cache, attached(model, head, lambda x: write.append(x[0, -1])):
        own(model)
    stream, config = cache[last][0, -1], model.config
    scale = stream.pow(2).mean().add(config.rms_norm_eps).rsqrt()
    factor = scale * getattr(config, "residual_multiplier", 1.0) / getattr(config, "logits_scaling", 1.0)
    unembedding = model.lm_head.weight[7] - model.lm_head.weight[8]
    expected = float(unembedding @ (model.model.norm.weight * write[0])) * float(factor)
    found = direct_logit_attribution(model, IDS, 7, against=8)
    assert found["L1H2"] == pytest.approx(expected, abs=1e-5)
    assert found.heads()[1, 2] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(KeyError, match="'L9H0' is no part"):
        found["L9H0"]


def test_bfloat16_sums_but_for_its_rounding():
    found = direct_logit_attribution(build("llama", dtype=torch.bfloat16), IDS, 7, against=8)
    assert sum(part.value for part in found.parts) == pytest.approx(found.total, abs=0.1)


def test_the_lens_draws_itself():
    figure = logit_lens(build("llama"), IDS, k=1).figure()
    assert figure.layout.yaxis.title.text == "site"
    assert len(figure.data[0].z) == N_LAYERS + 1
    assert lens_figure([[None]], [["<b>"]], ["L0"], ["\n"]).data[0].text[0][0] == "&lt;b&gt;"


def test_every_family_is_here():
    assert len(FAMILIES) + len(UNLISTED_MOE) == 27
