"""Counts of experts are those of the family's own rule, whatever the pads, the batch and the cache."""

import pytest
import torch
from families import MOE, UNLISTED_MOE, build_sparse

from probes.activations.experts import ExpertCounts, counting, read_experts, weights_along
from probes.generation._generate import generate
from probes.generation.sampling import Sampling
from probes.model.hooks import attached, forward_through
from probes.model.loading import load
from probes.model.routers import Routing, block_at, hook_router, moe_layers
from probes.model.sites import Site
from steer.interventions.routing import Force
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied

FAMILIES = (*MOE, *UNLISTED_MOE)
DENSE_FIRST = ("qwen3_moe", "deepseek_v3", "glm4_moe", "ernie4_5_moe")
THINK, CLOSE = 3, 4


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module", params=FAMILIES)
def sparse(request):
    return build_sparse(request.param)


def rows(count=5, seed=0, vocabulary=97):
    """Token ids of several lengths, each with a thinking of its own."""
    rng = torch.Generator().manual_seed(seed)
    words = [torch.randint(6, vocabulary, (7 + 3 * i,), generator=rng).tolist() for i in range(count)]
    return [(1, *some[:3], 5, THINK, *some[3:-2], CLOSE, *some[-2:]) for some in words]


def batch_of(given, side):
    width = max(map(len, given))
    pads = [[0] * (width - len(row)) for row in given]
    ids = [[*p, *row] if side == "left" else [*row, *p] for p, row in zip(pads, given, strict=True)]
    mask = [[0] * len(p) + [1] * len(row) for p, row in zip(pads, given, strict=True)]
    mask = mask if side == "left" else [line[::-1] for line in mask]
    return torch.tensor(ids), torch.tensor(mask)


def chosen(config, block, x):
    """The experts of one token by the family's published rule, written out with plain loops."""
    router = block.router
    weight = router.weight.double()
    logits = weight @ x.double() + (router.bias.double() if config.model_type == "gpt_oss" else 0)
    if config.model_type not in ("deepseek_v3", "glm4_moe", "minimax_m2"):
        bias = router.moe_statics.e_score_correction_bias if config.model_type == "ernie4_5_moe" else None
        score = logits.softmax(0) + (bias.double().squeeze() if bias is not None else 0)
        return set(score.sort(descending=True).indices[: router.top_k].tolist())
    bias = (block.block if config.model_type == "minimax_m2" else router).e_score_correction_bias
    score = logits.sigmoid() + bias.double()
    groups = score.view(getattr(config, "n_group", 1), -1)
    best = [sum(sorted(group.tolist())[-2:]) for group in groups]
    allowed = sorted(range(len(best)), key=lambda g: -best[g])[: getattr(config, "topk_group", 1)]
    size = groups.shape[1]
    candidates = [g * size + i for g in allowed for i in range(size)]
    return set(sorted(candidates, key=lambda e: -float(score[e]))[: router.top_k])


@torch.no_grad()
def test_counts_are_those_of_the_families_rule(sparse):
    """The router's input, caught on its way, gives the same choices by the rule as written here."""
    given, wanted, heard = rows(3), {}, {}
    layers = moe_layers(sparse)
    assert layers == ((1, 2) if sparse.config.model_type in DENSE_FIRST else (0, 1, 2))
    for layer in layers:
        block = block_at(sparse, layer)
        handle = block.router.register_forward_pre_hook(
            lambda _m, args, at=layer: heard.setdefault(at, []).append(args[0])
        )
        wanted[layer] = [0, 0, 0, 0]
        with handle:
            for row in given:
                sparse(input_ids=torch.tensor([row]))
        for x in torch.cat([part.reshape(-1, part.shape[-1]) for part in heard[layer]]):
            for expert in chosen(sparse.config, block, x):
                wanted[layer][expert] += 1
    with counting(sparse) as seen:
        for row in given:
            sparse(input_ids=torch.tensor([row]))
    assert {layer: seen.counts[0, i].tolist() for i, layer in enumerate(layers)} == wanted
    assert int(seen.tokens[0]) == sum(map(len, given))


@torch.no_grad()
def test_groups_and_a_bias_decide_as_the_rule_says():
    model = build_sparse("deepseek_v3")
    block = block_at(model, 1)
    router = block.router
    router.num_group, router.topk_group = 2, 1
    router.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    model.config.n_group, model.config.topk_group = 2, 1
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    _, _, ids = router(x)
    assert [set(row) for row in ids.tolist()] == [chosen(model.config, block, row) for row in x]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(sparse, side):
    given = rows()
    with counting(sparse, ["<think>", "w9"]) as alone:
        for row in given:
            sparse(input_ids=torch.tensor([row]))
    ids, mask = batch_of(given, side)
    with counting(sparse, ["<think>", "w9"]) as together:
        sparse(input_ids=ids, attention_mask=mask)
    assert torch.equal(alone.tokens, together.tokens)
    assert torch.equal(alone.counts, together.counts)


@torch.no_grad()
def test_prefill_and_decoding_equal_one_pass(sparse):
    given = rows(1)[0]
    with counting(sparse, ["</think>"]) as whole:
        sparse(input_ids=torch.tensor([given]))
    with counting(sparse, ["</think>"]) as steps:
        cache = sparse(input_ids=torch.tensor([given[:6]]), use_cache=True).past_key_values
        for at in range(6, len(given)):
            cache = sparse(input_ids=torch.tensor([[given[at]]]), past_key_values=cache).past_key_values
    assert torch.equal(whole.tokens, steps.tokens)
    assert torch.equal(whole.counts, steps.counts)


@torch.no_grad()
def test_what_is_held_back_for_a_while_is_counted_all_the_same():
    """More decode steps than are held, several batches one after another, and passes that stop below the top."""
    model = build_sparse("qwen3_moe")
    rng = torch.Generator().manual_seed(4)
    whole = [torch.randint(6, 97, (size, 150), generator=rng) for size in (2, 3)]
    for ids in whole:
        ids[:, 3], ids[:, 7], ids[0, 40], ids[1, 141] = 5, THINK, CLOSE, CLOSE
    with counting(model, ["<think>", "</think>", "w9"]) as at_once:
        for ids in whole:
            model(input_ids=ids)
    with counting(model, ["<think>", "</think>", "w9"]) as steps:
        for ids in whole:
            cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
            for at in range(5, 150):
                cache = model(input_ids=ids[:, at : at + 1], past_key_values=cache).past_key_values
    assert torch.equal(steps.tokens, at_once.tokens)
    assert torch.equal(steps.counts, at_once.counts)
    with counting(model) as cut:
        model(input_ids=whole[0])
        forward_through(model, 1, whole[1], torch.ones_like(whole[1]))
    assert cut.tokens[0] == 150 * 5
    assert torch.equal(cut.counts[0, 0], at_once.counts[0, 0])  # layer 1 ran in both, layer 2 in one
    assert int(cut.counts[0, 1].sum()) == 2 * 150 * 2


def test_a_cache_that_was_not_counted_from_its_start_is_refused():
    model = build_sparse("qwen3_moe")
    cache = model(input_ids=torch.tensor([[1, 9, 5, 3]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="The cache holds 4 tokens of 1 rows, but the clock saw 0"), counting(model):
        model(input_ids=torch.tensor([[9]]), past_key_values=cache)

    def another_run_first():
        with counting(model):
            model(input_ids=torch.tensor([[1, 9, 5]]))
            model(input_ids=torch.tensor([[9]]), past_key_values=cache)

    with pytest.raises(ValueError, match="The cache holds 5 tokens of 1 rows, but the clock saw 3"):
        another_run_first()


def test_weights_along_a_completion_are_those_that_its_tokens_were_given(organism):
    (done,) = generate(organism, ["a 3 b +4 c *7"], sampling=Sampling.of(organism, max_new_tokens=30))
    weights = weights_along(organism, done)
    assert weights.shape == (4, len(done.all_ids), 8)
    torch.testing.assert_close(weights.sum(2), torch.ones(4, len(done.all_ids)))  # this family normalises them
    assert torch.equal((weights > 0).sum(1), read_experts(organism, [done]).counts[0, 0].long())


@torch.no_grad()
def test_routers_that_a_kernel_passes_by_are_missed():
    model = build_sparse("mixtral")
    for layer in moe_layers(model):
        block = block_at(model, layer).block
        block.forward = lambda x: x
    with pytest.raises(ValueError, match="not through the hook at the router of layer 0"), counting(model):
        model(input_ids=torch.tensor([[1, 9, 5]]))


def test_classes_are_the_phases_and_the_markers():
    model = build_sparse("qwen3_moe")
    with counting(model, ["<think>", "w9", "nowhere"]) as seen:
        model(input_ids=torch.tensor([[1, 9, 5, 3, 9, 9, 4, 8, 8]]))
    assert seen.classes == ("all", "prompt", "thinking", "answer", "<think>", "w9")
    assert seen.tokens.tolist() == [9, 3, 3, 3, 1, 3]  # an opening tag is thinking, a closing one answer
    assert (seen.counts.sum(2) == 2 * seen.tokens[:, None]).all()
    assert seen.load("w9").sum().item() == pytest.approx(2 * 2)
    assert seen.lacking == ("nowhere",)
    with pytest.raises(ValueError, match="'nowhere' is not in the vocabulary. Known: all, prompt"):
        seen.load("nowhere")
    with pytest.raises(ValueError, match="'w8' is no class of these tokens. Known: all, prompt"):
        seen.load("w8")
    twice = seen + seen
    assert torch.equal(twice.counts, 2 * seen.counts)
    assert twice.table().rows == tuple((name, 2 * n, share) for name, n, share in seen.table().rows)
    with pytest.raises(ValueError, match="do not add up"):
        seen + ExpertCounts((0,), seen.classes, seen.counts, seen.tokens)


@torch.no_grad()
def test_a_marker_of_several_ways_and_tokens_counts_where_it_ends_also_across_passes(monkeypatch):
    monkeypatch.setattr("probes.activations.experts.present_markers", lambda *_: ({"m": [(9,), (8, 7)]}, ()))
    model, ids = build_sparse("qwen3_moe"), torch.tensor([[1, 8, 7, 9, 7, 8, 8, 7, 9]])
    with counting(model, ["m"]) as whole:
        model(input_ids=ids)
    with counting(model, ["m"]) as steps:
        cache = model(input_ids=ids[:, :2], use_cache=True).past_key_values
        for at in range(2, 9):
            cache = model(input_ids=ids[:, at : at + 1], past_key_values=cache).past_key_values
    assert int(whole.tokens[-1]) == int(steps.tokens[-1]) == 4
    assert torch.equal(whole.counts, steps.counts)


def test_a_reading_of_completions_adds_up_to_what_is_counted(organism):
    sampling = Sampling.of(organism, max_new_tokens=30)
    done = generate(organism, ["a 3 b +4 c *7", "a 9 b -2", "a 1 b +1 c +1 d +1 quick"], sampling=sampling)
    reading = read_experts(organism, done, ["<think>", "Wait", "Alternatively"])
    assert reading.lacking == ("Alternatively",)
    with counting(organism, ["<think>", "Wait"]) as seen, torch.no_grad():
        for c in done:
            organism(input_ids=torch.tensor([c.all_ids]))
    assert torch.equal(reading.total().counts, seen.counts)
    for i, c in enumerate(done):
        alone = read_experts(organism, [c], ["<think>", "Wait", "Alternatively"])
        assert torch.equal(alone.counts[0], reading.counts[i])
        assert int(reading.tokens[i, 0]) == len(c.all_ids)


def test_what_is_counted_is_what_the_router_chose_and_not_what_steering_makes_of_it(organism):
    ids = torch.tensor(rows(1, vocabulary=60))
    recipe = Recipe.of(organism, [Force.of((3, 5))])  # the last layer: nothing after it routes otherwise
    with counting(organism) as plain, torch.no_grad():
        before = organism(input_ids=ids).logits
    for inner, outer in (
        (counting(organism), applied(organism, recipe)),
        (applied(organism, recipe), counting(organism)),
    ):
        with outer as a, inner as b, torch.no_grad():
            after = organism(input_ids=ids).logits
        seen = a if isinstance(a, ExpertCounts) else b
        assert torch.equal(seen.counts, plain.counts)
        assert not torch.equal(before, after)


def test_a_routers_weights_are_laid_out_by_expert(organism):
    caught: list[Routing] = []
    with hook_router(organism, 1, see=caught.append), torch.no_grad():
        organism(input_ids=torch.tensor(rows(1, vocabulary=60)))
    (routing,) = caught
    assert routing.dense.shape == (*routing.ids.shape[:2], 8)
    assert torch.equal(routing.dense.gather(-1, routing.ids), routing.weights)
    assert ((routing.dense > 0).sum(-1) == 2).all()


@pytest.mark.parametrize(
    ("family", "call", "sentence"),
    [
        ("llama", lambda m: moe_layers(m), "llama has no sparse block with a router and experts"),
        (
            "deepseek_v3",
            lambda m: block_at(m, 0),
            "Layer 0 has no sparse block. The layers of this deepseek_v3.*: 1, 2",
        ),
        ("qwen3_moe", lambda m: read_experts(m, []), "Experts are read off completions, but there is none"),
    ],
)
def test_what_cannot_be_read_is_refused(family, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(build_sparse(family))


def test_a_router_of_another_kind_is_refused_by_name():
    model = build_sparse("qwen3_moe")
    router = block_at(model, 1).router
    whole = type(router).forward
    router.forward = lambda x: whole(router, x)[:2]
    with (
        pytest.raises(ValueError, match="A Qwen3MoeTopKRouter does not give back logits, weights and ids"),
        counting(model),
    ):
        model(input_ids=torch.tensor([[1, 9, 5]]))


def test_a_routing_site_is_no_activation():
    model = build_sparse("qwen3_moe")
    with (
        pytest.raises(ValueError, match="L1E2.routing is no activation but a router's choice"),
        attached(model, Site(1, "routing", expert=2), lambda _: None),
    ):
        pass
