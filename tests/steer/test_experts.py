"""Routing edits: nothing chosen is nothing changed, what is forced is chosen, and what folds equals what ran."""

import copy

import pytest
import torch
from families import MOE, UNLISTED_MOE, build, build_sparse
from transformers import AutoModelForCausalLM

from probes.activations.experts import read_experts
from probes.evidence.association import associate
from probes.generation._generate import generate
from probes.generation.completions import Completion
from probes.generation.sampling import Sampling
from probes.model.loading import load
from probes.model.routers import block_at, hook_router, moe_layers
from probes.model.sites import Site
from probes.thinking.spans import Span
from steer.folding._export import export
from steer.folding._fold import fold, fold_error, folded
from steer.folding.draft import NotFoldable
from steer.interop.formats import export_recipe
from steer.interventions.activation import Ablate
from steer.interventions.routing import Forbid, Force, Reinforce
from steer.recipes.controller import Schedule
from steer.recipes.recipe import Recipe
from steer.recipes.scope import Scope
from steer.runtime._applied import NeverFired, applied
from steer.runtime.calibration import calibrated
from steer.runtime.rerouting import SelectionRule

FAMILIES = (*MOE, *UNLISTED_MOE)
REROUTED = tuple(family for family in FAMILIES if family != "minimax_m2")  # its router asks for more than its input
IDS = torch.tensor([[0, 0, 1, 9, 30, 5, 3, 41, 52, 63, 4, 17], [1, 8, 14, 25, 36, 5, 3, 47, 58, 69, 71, 82]])
MASK = torch.tensor([[0, 0, *[1] * 10], [1] * 12])


@pytest.fixture(scope="module", params=FAMILIES)
def sparse(request):
    return build_sparse(request.param)


@pytest.fixture(scope="module", params=MOE)
def foldable(request):
    return build_sparse(request.param)


def last(model):
    return moe_layers(model)[-1]


@torch.no_grad()
def logits(model, recipe=None):
    if recipe is None:
        return model(input_ids=IDS, attention_mask=MASK).logits
    with applied(model, recipe) as fired:
        out = model(input_ids=IDS, attention_mask=MASK).logits
    return out, fired


@torch.no_grad()
def routing_of(model, layer):
    caught = []
    with hook_router(model, layer, see=caught.append):
        model(input_ids=IDS, attention_mask=MASK)
    return caught[0]


def by_use(model, layer):
    """The experts of a layer, the least chosen first."""
    ids = routing_of(model, layer).ids[MASK.bool()]
    return torch.bincount(ids.flatten(), minlength=4).sort(stable=True).indices.tolist()


def test_a_strength_of_one_changes_no_bit(sparse):
    busy = [(layer, by_use(sparse, layer)[-1]) for layer in moe_layers(sparse)]
    steps = [Reinforce.of(expert, 1.0, renormalise=expert == busy[-1]) for expert in busy]
    steered, fired = logits(sparse, Recipe.of(sparse, steps[:-1]))
    assert torch.equal(steered, logits(sparse))
    assert fired.mean_ratio() == 0
    renormalised, _ = logits(sparse, Recipe.of(sparse, steps))
    torch.testing.assert_close(renormalised, logits(sparse), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", REROUTED)
def test_with_nothing_forced_the_rule_is_the_models_own_bit_for_bit(family):
    model = build_sparse(family)
    for layer in moe_layers(model):
        block, seen = block_at(model, layer), routing_of(model, layer)
        flat = seen.logits.flatten(0, 1)
        never = torch.zeros_like(flat, dtype=torch.bool)
        weights, ids = SelectionRule(block)(flat, never, never)
        assert torch.equal(ids, seen.ids.flatten(0, 1))
        assert torch.equal(weights, seen.weights.flatten(0, 1))


@pytest.mark.parametrize("family", REROUTED)
def test_what_is_forced_is_chosen_and_what_is_forbidden_is_not_and_only_within_the_scope(family):
    model = build_sparse(family)
    layer, thinking = last(model), [(1, range(6, 12)), (0, range(6, 10))]
    before, (rare, *_, busy) = routing_of(model, layer), by_use(model, layer)
    recipe = Recipe.of(model, [Force.of((layer, rare)), Forbid.of((layer, busy))], scope="thinking")
    got = []
    experts = block_at(model, layer).experts
    with (
        applied(model, recipe) as fired,
        torch.no_grad(),
        experts.register_forward_pre_hook(lambda _m, args: got.append((args[1], args[2]))),
    ):
        model(input_ids=IDS, attention_mask=MASK)
    ids, weights = (part.reshape(before.ids.shape) for part in got[0])
    inside = torch.zeros_like(MASK, dtype=torch.bool)
    for row, places in thinking:
        inside[row, list(places)] = True
    chosen = torch.zeros(2, 12, 4, dtype=torch.bool).scatter(-1, ids, True)
    own = torch.zeros(2, 12, 4, dtype=torch.bool).scatter(-1, before.ids, True)
    assert chosen[..., rare][inside].all()
    assert not chosen[..., busy][inside].any()
    assert torch.equal(ids[~inside], before.ids[~inside])
    assert torch.equal(weights[~inside], before.weights[~inside])
    for step, expert in enumerate((rare, busy)):  # logged is what became otherwise
        assert sum(map(len, fired.positions(step))) == int((own[..., expert] != chosen[..., expert])[inside].sum())


def test_reinforcement_multiplies_one_weight_where_the_router_chose_it(sparse):
    layer = last(sparse)
    before, busy = routing_of(sparse, layer), by_use(sparse, layer)[-1]
    held = (before.ids == busy).any(-1) & MASK.bool()
    got = []
    for renormalise in (False, True):
        recipe = Recipe.of(sparse, [Reinforce.of((layer, busy), 8.0, renormalise=renormalise)])
        with (
            torch.no_grad(),
            applied(sparse, recipe) as fired,
            block_at(sparse, layer).experts.register_forward_pre_hook(lambda _m, args: got.append(args[1:])),
        ):
            sparse(input_ids=IDS, attention_mask=MASK)
        ids, weights = (part.reshape(before.ids.shape) for part in got[-1])
        wanted = torch.where((ids == busy) & MASK[..., None].bool(), before.weights * 8, before.weights)
        if renormalise:
            wanted = wanted * (before.weights.sum(-1, keepdim=True) / wanted.sum(-1, keepdim=True))
        torch.testing.assert_close(weights, wanted)
        assert torch.equal(ids, before.ids)
        assert sum(map(len, fired.positions())) == int(held.sum())


@torch.no_grad()
def test_a_schedule_moves_the_strength_from_one():
    model = build_sparse("qwen3_moe")
    layer, expert = 2, int(routing_of(model, 2).ids[0, 7, 0])

    def weights(strength, scope):
        got = []
        recipe = Recipe.of(model, [Reinforce.of((layer, expert), strength)], scope=scope)
        with (
            applied(model, recipe),
            block_at(model, layer).experts.register_forward_pre_hook(lambda _m, args: got.append(args[2])),
        ):
            model(input_ids=IDS, attention_mask=MASK)
        return got[0]

    half = Scope("thinking", schedule=Schedule("linear", 0.5, 0.5, 9))
    torch.testing.assert_close(weights(9.0, half), weights(5.0, Scope("thinking")))  # half way from 1 to 9
    recipe = Recipe.of(model, [Force.of((2, 1))], scope=half)
    with pytest.raises(ValueError, match="A force at L2E1.routing is done or not"), applied(model, recipe):
        pass


@pytest.mark.parametrize("strength", [2.0, 64.0])
def test_folded_reinforcement_equals_the_one_at_run_time(foldable, strength):
    steps = [Reinforce.of((layer, expert), strength) for layer in moe_layers(foldable)[-2:] for expert in (0, 3)]
    recipe = Recipe.of(foldable, steps)
    twin = folded(foldable, recipe)
    largest = float(logits(foldable, recipe)[0].abs().max())
    assert fold_error(foldable, twin, recipe, IDS, MASK) <= 1e-5 * largest
    assert not torch.allclose(logits(twin), logits(foldable))


@pytest.mark.parametrize("family", MOE)
def test_forbidding_folds_where_the_router_has_a_bias(family):
    model = build_sparse(family)
    recipe = Recipe.of(model, [Forbid.of((last(model), 1))])
    if family in ("gpt_oss", "deepseek_v3"):
        report = fold(twin := copy.deepcopy(model), recipe)
        assert len(report.changed) == 1
        assert report.changed[0].endswith("bias")
        assert fold_error(model, twin, recipe, IDS, MASK) <= 1e-5 * float(logits(model).abs().max())
    else:
        with pytest.raises(NotFoldable, match="has no bias to choose by"):
            fold(model, recipe)


@pytest.mark.parametrize(
    ("edit", "scope", "sentence"),
    [
        (Reinforce.of((2, 1), 2.0, renormalise=True), "all", "reinforced and renormalised"),
        (Reinforce.of((2, 1), 2.0), "thinking", "changed in scope 'thinking'"),
        (Force.of((2, 1)), "all", "is forced, and no weights make a router"),
    ],
)
def test_what_no_weights_equal_is_not_folded(edit, scope, sentence):
    model = build_sparse("qwen3_moe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotFoldable, match=sentence):
        fold(model, Recipe.of(model, [edit], scope=scope))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", UNLISTED_MOE)
def test_a_family_whose_row_names_no_experts_is_not_folded(family):
    model = build_sparse(family)
    with pytest.raises(NotFoldable, match=f"has no matrix that a row names for {family}"):
        fold(model, Recipe.of(model, [Reinforce.of((last(model), 1), 2.0)]))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_an_exported_reinforcement_is_an_ordinary_checkpoint(family, tmp_path):
    model = build_sparse(family)
    recipe = Recipe.of(model, [Reinforce.of((last(model), 1), 16.0), Ablate(Site(1, "mlp_out"), torch.ones(32))])
    export(model, recipe, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = plain(input_ids=IDS, attention_mask=MASK).logits
    steered, _ = logits(model, recipe)
    real = MASK.bool()
    assert float((found - steered)[real].abs().max()) <= 1e-5 * float(steered.abs().max())


def test_a_recipe_of_routing_edits_travels(tmp_path):
    model = build_sparse("qwen3_moe")
    steps = [Reinforce.of((1, 2), 32.0, renormalise=True), Force.of((1, 0)), Forbid.of((2, 3))]
    recipe = Recipe.of(model, steps, scope="thinking", method="RICE")
    recipe.save(tmp_path / "r")
    again = Recipe.load(tmp_path / "r")
    assert [(type(s.intervention), str(s.intervention.site), s.intervention.strength) for s in again.steps] == [
        (Reinforce, "L1E2.routing", 32.0), (Force, "L1E0.routing", 1.0), (Forbid, "L2E3.routing", 1.0),
    ]  # fmt: skip
    assert again.steps[0].intervention.renormalise is True
    assert torch.equal(logits(model, again)[0], logits(model, recipe)[0])
    assert again.fingerprint() == recipe.fingerprint()


def test_padding_the_cache_and_the_batch_change_nothing(organism):
    prompts = ["a 3 b +4 c *7", "a 9 b -2 quick", "a 1 b +1 c +1 d +1 e -4 f *3"]
    recipe = Recipe.of(organism, [Reinforce.of((1, 0), 3.0), Forbid.of((2, 4))], scope="thinking")
    sampling = Sampling.of(organism, max_new_tokens=30)
    with applied(organism, recipe) as fired:
        together = generate(organism, prompts, sampling=sampling)
    batched = [fired.positions(step) for step in (0, 1)]
    for row, (prompt, whole) in enumerate(zip(prompts, together, strict=True)):
        with applied(organism, recipe) as alone:
            (single,) = generate(organism, [prompt], ids=[whole.id], sampling=sampling)
        assert single.ids == whole.ids
        assert [alone.positions(step)[0] for step in (0, 1)] == [batched[s][row] for s in (0, 1)]
        with applied(organism, recipe) as forced, torch.no_grad():
            organism(input_ids=torch.tensor([whole.all_ids[:-1]]))
        assert forced.positions(0) == alone.positions(0)


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@torch.no_grad()
def test_a_planted_expert_is_found_and_reinforcing_it_changes_the_markers_rate():
    """One expert of the last layer is made to answer to one token, and to write another one's unembedding."""
    model = build("qwen3_moe", seed=3)
    marker, written, layer, expert = 40, 77, 2, 3
    block_at(model, 1).router.weight.zero_()  # chooses the same for all tokens
    block = block_at(model, layer)
    heard = []
    rng = torch.Generator().manual_seed(0)
    texts = torch.randint(6, 97, (30, 20), generator=rng)
    texts[:, [5, 12]] = marker
    with block.router.register_forward_pre_hook(lambda _m, args: heard.append(args[0].reshape(30, 20, 32))):
        model(input_ids=texts)
    at, others = heard[0][:, [5, 12]].flatten(0, 1), heard[0][texts != marker]
    away = torch.linalg.lstsq(
        others.T @ others / len(others) + 0.01 * torch.eye(32), at.mean(0) - others.mean(0)
    ).solution
    block.router.weight[expert] = 30 * away / ((at.mean(0) - others.mean(0)) @ away)
    out, gate_up = model.lm_head.weight[written], block.experts.gate_up_proj
    gate_up[expert, gate_up.shape[1] // 2 :] = gate_up[expert, : gate_up.shape[1] // 2]  # silu(g) g is never below 0
    block.experts.down_proj[expert] = 0.5 * out[:, None] / out.norm()

    rows = [completion_of(text.tolist()) for text in texts]
    found = associate(read_experts(model, rows, [f"w{marker}"]), {f"w{marker}": 1.0})
    assert found.top(1) == [(layer, expert)]
    second = found.top(2)[1]
    assert found.low[found.layers.index(layer), expert] > found.high[found.layers.index(second[0]), second[1]]

    def rate(experts):
        """How likely the written token is after the marker."""
        ids = texts[:, :13]
        recipe = Recipe.of(model, [Reinforce.of(e, 64.0) for e in experts])
        with applied(model, recipe, must_fire=False):
            return float(model(input_ids=ids).logits[:, -1].softmax(-1)[:, written].mean())

    plain = float(model(input_ids=texts[:, :13]).logits[:, -1].softmax(-1)[:, written].mean())
    gains = [
        abs(rate([e]) - plain) for e in (found.matched([(layer, expert)], seed=seed, near=7)[0] for seed in range(8))
    ]
    assert rate([(layer, expert)]) - plain > 2 * max(gains)


def completion_of(ids):
    return Completion(
        "0", 0, "", None, "", tuple(ids[:1]), tuple(ids[1:]), None, "eos", Sampling(max_new_tokens=1), "x"
    )


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda m: Recipe.of(m, [Reinforce.of((0, 1))]), ValueError, "Layer 0 has no sparse block.*have one: 1, 2"),
        (
            lambda m: Recipe.of(m, [Reinforce.of((1, 4))]),
            IndexError,
            "Expert 4 is out of range: layer 1 has experts 0 to 3",
        ),
        (lambda m: Recipe.of(m, [Force.of((1, 1)), Forbid.of((1, 1))]), ValueError, "both forced and forbidden"),
        (lambda m: Recipe.of(m, [Forbid.of((1, e)) for e in range(3)]), ValueError, "none of 3 forbidden ones.*2 of 4"),
        (lambda m: Recipe.of(m, [Force.of((1, e)) for e in range(3)]), ValueError, "cannot choose 3 forced experts"),
    ],
)
def test_what_a_router_cannot_do_is_refused(make, error, sentence):
    model = build_sparse("qwen3_moe")
    with pytest.raises(error, match=sentence), applied(model, make(model)):
        pass


def test_a_dense_model_has_no_experts_to_reinforce():
    model = build("llama")
    with (
        pytest.raises(ValueError, match="llama has no sparse block"),
        applied(model, Recipe.of(model, [Force.of((0, 1))])),
    ):
        pass


def test_a_router_that_cannot_be_rerun_is_refused_by_name():
    model = build_sparse("minimax_m2")
    recipe = Recipe.of(model, [Force.of((1, 1))])
    with pytest.raises(ValueError, match="The routing rule of minimax_m2 cannot be re-run"), applied(model, recipe):
        pass


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -1.0])
def test_a_strength_is_a_finite_number_of_no_less_than_zero(strength):
    with pytest.raises(ValueError, match="Give a finite number, 0 or more"):
        Reinforce.of((1, 1), strength)


def test_what_is_forbidden_is_not_reinforced():
    model = build_sparse("qwen3_moe")
    busy = (2, by_use(model, 2)[-1])
    _, fired = logits(model, Recipe.of(model, [Forbid.of(busy), Reinforce.of(busy)]))
    assert fired.positions(0) != [[], []]
    assert fired.positions(1) == [[], []]


def test_a_reinforcement_that_meets_no_token_never_fired():
    model = build_sparse("qwen3_moe")
    rare = (2, by_use(model, 2)[0])
    alone = next(row for row in range(12) if rare[1] not in routing_of(model, 2).ids[1, row])
    with pytest.raises(NeverFired, match=f"reinforce at L2E{rare[1]}.routing"):
        logits(model, Recipe.of(model, [Reinforce.of(rare)], scope=Scope("all", tokens=(int(IDS[1, alone]),))))


@pytest.mark.parametrize("edit", [Force.of((1, 2)), Forbid.of((1, 2))])
def test_what_is_done_or_not_has_no_strength_to_calibrate(edit):
    model = build_sparse("qwen3_moe")
    with pytest.raises(ValueError, match="L1E2.routing is done or not: it has no strength"):
        calibrated(model, Recipe.of(model, [edit]), [Span(tuple(IDS[1].tolist()), 4, 8)])


@pytest.mark.parametrize("name", ["r.gguf", "r.json", "r.pt"])
def test_neighbours_that_cannot_hold_a_routing_edit_refuse_it_by_name(name, tmp_path):
    model = build_sparse("qwen3_moe")
    formats = {"r.gguf": ["gguf"], "r.json": ["easysteer", "vllm-lens"], "r.pt": ["lm-eval"]}
    for form in formats[name]:
        with pytest.raises(ValueError, match="reinforce"):
            export_recipe(Recipe.of(model, [Reinforce.of((1, 2))]), tmp_path / name, form, model=model)
    assert not list(tmp_path.iterdir())
