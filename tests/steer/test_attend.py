"""Attention to a region is scaled as the formula says, in every family, batch and cache, and nothing else moves."""

import sys
from dataclasses import replace

import pytest
import torch
import yaml
from families import build, build_tokenizer
from tiny import tiny_model

from probes import Sampling, Site, attached, captured, generate, load
from probes.activations import Attended, _interface, span_attention
from probes.model import sites_in
from probes.model.architectures import tap_of
from probes.rows import Rows
from probes.thinking.phases import Clock
from steer import Add, Attend, NeverFired, NotFoldable, Recipe, Scale, Schedule, Scope, applied, folded
from steer.folding import check_folds
from steer.interop import export_recipe
from steer.interventions import Reinforce
from steer.recipes import Controller
from steer.runtime import scaled
from steer.runtime.regions import Regions

FAMILIES = ("llama", "gpt_oss", "gemma2", "mistral", "deepseek_v3", "qwen3_moe", "gpt2", "gemma3_text")
WINDOWED = ("gpt_oss", "gemma2", "mistral", "gemma3_text")
HEADS = (None, 2)
IDS = [1, 7, 8, 9, 10, 5, 11, 3, 20, 21, 22, 23, 4, 30, 31]  # 0-6 prompt, 7-11 thinking, 12-14 answer
PROMPT, THINKING, ANSWER = slice(0, 7), slice(7, 12), slice(12, 15)
WARM = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=16)
ENDS = [2, *range(20, 32)]  # so many that most rows end early, each in its own time
PROMPTS = [" ".join(f"w{7 + (3 * i + j) % 80}" for j in range(1 + (5 * i) % 9)) for i in range(11)]


def family(name, window=6):
    model = build(name)
    if name in WINDOWED:
        model.config.sliding_window = window
    return model


@pytest.fixture(scope="module")
def organism():
    return load("organism")


def at(layer, head=None):
    return Site(layer, "pattern", head)


def everywhere(model, strength=6.0, **region):
    return [Attend(at(site.layer), strength, **region) for site in sites_in(model, "resid_post")]


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(torch.tensor([ids]), **more).logits


def steered(model, edits, ids=IDS, scope="all"):
    with applied(model, Recipe.of(model, edits, scope=scope)) as log:
        return logits(model, ids), log


def by_hand(monkeypatch, name, layer, ids):
    """The eager weights [heads new keys] and values [heads keys d_value] of a layer, kept by the family's function."""
    model, kept = family(name), {}
    model.set_attn_implementation("eager")
    file = sys.modules[type(model).__module__]
    own = file.eager_attention_forward

    def keeping(module, query, key, value, mask, **words):
        out = own(module, query, key, value, mask, **words)
        groups = query.shape[1] // value.shape[1]
        kept[module.layer_idx] = out[1][0], value[0].repeat_interleave(groups, 0)
        return out

    monkeypatch.setattr(file, "eager_attention_forward", keeping)
    logits(model, ids)
    monkeypatch.setattr(file, "eager_attention_forward", own)
    return kept[layer]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("strength", [4.0, 0.25, 0.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_weights_multiplied_and_normalised_by_hand(name, strength, head, monkeypatch):
    """In one layer; and the rest of the pass is the model's own."""
    layer, queries, keys = 1, slice(7, 12), slice(1, 4)
    weights, values = by_hand(monkeypatch, name, layer, IDS)
    factor = torch.ones_like(weights)
    factor[slice(None) if head is None else head, queries, keys] = strength
    sink = 1 - weights.sum(-1, keepdim=True)
    new = weights * factor / ((weights * factor).sum(-1, keepdim=True) + sink)
    z = (new @ values).transpose(0, 1).flatten(1)[None]

    model, site = family(name), Site(layer, "z")
    edit = Attend(at(layer, head), strength, first=1, last=4)
    with captured(model, [site]) as seen:
        out, log = steered(model, [edit], scope="thinking")
    torch.testing.assert_close(seen[site], z, atol=1e-5, rtol=1e-5)
    with attached(model, site, lambda _: z):
        torch.testing.assert_close(out, logits(model), atol=1e-4, rtol=1e-4)
    assert (out - logits(model)).abs().max() > 1e-3
    seen_by = int((weights[0, queries, keys] > 0).any(-1).sum())
    assert log.tokens == seen_by
    old = (weights @ values).transpose(0, 1)[queries]
    old, moved = (
        x[:, head] if head is not None else x.flatten(1)
        for x in (old, (z[0].unflatten(-1, (len(weights), -1))[queries] - old))
    )
    ratios = moved.norm(dim=-1) / old.norm(dim=-1)
    assert log.mean_ratio() == pytest.approx(float(ratios.sum()) / seen_by, rel=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_strength_of_one_is_the_plain_model_to_the_bit(name):
    model = family(name)
    out, log = steered(model, everywhere(model, 1.0))
    assert torch.equal(out, logits(model))
    assert log.mean_ratio() == 0
    assert log.tokens > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_out_of_scope_stays_to_the_bit(name):
    model = build(name)
    plain = logits(model)
    for scope, tokens in (("prompt", PROMPT), ("thinking", THINKING), ("answer", ANSWER)):
        with captured(model, [Site(0, "z")]) as z:
            logits(model)
            before = z[Site(0, "z")]
            out, log = steered(model, everywhere(model, 0.2, first=1, last=4), scope=scope)
        assert torch.equal(out[:, : tokens.start], plain[:, : tokens.start])
        assert torch.equal(z[Site(0, "z")][:, tokens.stop :], before[:, tokens.stop :])
        assert (out[:, tokens] - plain[:, tokens]).abs().max() > 1e-3
        assert log.positions() == [[at for at in range(tokens.start, tokens.stop) if at]]


def test_what_no_bias_changes_is_the_model_s_own_output_however_the_rest_is_computed(monkeypatch):
    """As on a device whose kernels for a mask round otherwise."""
    model, site, run = build("llama"), Site(0, "z"), _interface.Attention.run

    def rounded(self, rows, mask):
        return run(self, rows, mask) + (0.0 if mask is None else 1e-3)

    monkeypatch.setattr(_interface.Attention, "run", rounded)
    with captured(model, [site]) as z:
        logits(model)
        before = z[site].unflatten(-1, (4, -1))
        steered(model, [Attend(at(0, 2), 0.2, first=1, last=4)], scope="thinking")
    moved = (z[site].unflatten(-1, (4, -1)) != before).any(-1)[0]
    assert moved.nonzero().tolist() == [[at, 2] for at in range(7, 12)]


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_are_those_of_their_phase_and_window(name):
    """At one layer, only queries that see such a key move: prompt 0-6, thinking 7-11, answer 12-14."""
    model, site = build(name), Site(0, "z")
    with captured(model, [site]) as plain:
        logits(model)
    regions = (("prompt", 2, 4, 2), ("thinking", 0, None, 7), ("thinking", 3, 4, 10), ("answer", 1, None, 13))
    for keys, first, last, begin in regions:
        with captured(model, [site]) as seen:
            steered(model, [Attend(at(0), 3.0, keys, first, last)])
        moved = (seen[site] - plain[site]).abs().amax(-1)[0] > 1e-6
        assert moved.nonzero().flatten().tolist() == list(range(begin, 15)), (keys, first, last)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "deepseek_v3", "qwen3_moe"])
def test_a_region_that_is_hidden_has_no_mass_and_one_that_is_scaled_has_what_the_odds_say(name):
    model = build(name)
    row = Attended(tuple(IDS), keys=(1, 2, 3), prompt=7, start=12, stop=15)
    (plain,) = span_attention(model, [row])
    (alone,) = span_attention(model, [replace(row, keys=tuple(range(7)))])
    for strength in (0.0, 3.0):
        with applied(model, Recipe.of(model, [Attend(at(0, 1), strength, first=1, last=4)])):
            (read,) = span_attention(model, [row])
        torch.testing.assert_close(read.mass[0, [0, 2, 3]], plain.mass[0, [0, 2, 3]])
        mass = plain.mass[0, 1]
        torch.testing.assert_close(read.mass[0, 1], strength * mass / (1 + (strength - 1) * mass), atol=1e-5, rtol=1e-4)
    with applied(model, Recipe.of(model, everywhere(model, 0.0))):
        (gone,) = span_attention(model, [replace(row, keys=tuple(range(7)))])
    assert gone.mass.eq(0).all()
    assert alone.mass.gt(0).all()


def test_a_query_that_would_see_nothing_keeps_its_attention():
    model = build("llama")
    plain = logits(model)
    out, log = steered(model, everywhere(model, 0.0))
    assert torch.equal(out[:, PROMPT], plain[:, PROMPT])
    assert out.isfinite().all()
    assert (out[:, THINKING] - plain[:, THINKING]).abs().max() > 1e-2
    assert log.tokens == 3 * 15


@pytest.mark.parametrize("name", FAMILIES)
def test_token_by_token_it_is_as_in_one_pass(name):
    """Of one row, whose passes have no mask."""
    model = build(name)
    recipe = Recipe.of(model, [*everywhere(model, 5.0, first=1, last=5), Attend(at(1, 3), 0.1, "answer")])
    with torch.no_grad(), applied(model, recipe):
        whole = logits(model)
        out = model(torch.tensor([IDS[:8]]), use_cache=True)
        for position, token in enumerate(IDS[8:], 8):
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            torch.testing.assert_close(out.logits[:, 0], whole[:, position], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_changes_nothing(name, cache):
    """Token by token as in one pass, left padded or not, of a cache that grows, forgets, or has room."""
    model = family(
        name, 64 if cache and name in ("mistral", "gemma3_text") else 6
    )  # no scope reads static windows alone
    edits = [
        *everywhere(model, 5.0, keys="prompt", first=1, last=5), *everywhere(model, 0.0, keys="thinking", last=2),
        Attend(at(1, 3), 0.1, "answer"),
    ]  # fmt: skip
    recipe, pads = Recipe.of(model, edits), 3
    with applied(model, recipe):
        whole = logits(model)
    ids = torch.tensor([[0] * pads + IDS, IDS[:2] + [9, 9, 9] + IDS[2:]])
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0
    forced = iter(ids.T[8:])

    def force(_, scores):
        return torch.full_like(scores, -torch.inf).scatter(1, next(forced)[:, None], 0.0)

    with torch.no_grad(), applied(model, recipe):
        out = model.generate(
            ids[:, :8], attention_mask=mask[:, :8], max_new_tokens=10, min_new_tokens=10, do_sample=False,
            pad_token_id=0, eos_token_id=96, cache_implementation=cache, logits_processor=[force], output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert out.sequences.tolist() == ids.tolist()
    stepped = torch.stack(out.logits, 1)
    torch.testing.assert_close(stepped[0, :, :], whole[0, 8 - pads - 1 : -1], atol=1e-4, rtol=1e-4)
    with applied(model, recipe):
        second = logits(model, ids[1].tolist())
    torch.testing.assert_close(stepped[1], second[0, 7:-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_moe"])
def test_rows_that_leave_and_join_are_steered_as_alone(name):
    model = family(name)
    model.generation_config.eos_token_id = ENDS
    edits = [*everywhere(model, 8.0, last=3), *everywhere(model, 0.1, keys="thinking"), Scale(Site(1, "mlp_out"), 0.5)]
    found = {}
    for size in (1, 3, 64):
        with applied(model, Recipe.of(model, edits)) as log:
            done = generate(model, PROMPTS, sampling=WARM, batch_size=size, prefill=(3,))
        found[size] = [c.ids for c in done], log.positions(0), [round(log.mean_ratio(i), 4) for i in range(7)]
    assert found[1] == found[3] == found[64]
    assert len({len(ids) for ids in found[1][0]}) > 3
    plain = generate(model, PROMPTS, sampling=WARM, prefill=(3,))
    assert [c.ids for c in plain] != found[1][0]


def test_the_organism_answers_alike_in_any_batch(organism):
    prompts = [f"a {k} b +{k} c *7{end}" for k in range(2, 9) for end in ("", " quick", " d -2 e +5")]
    recipe = Recipe.of(organism, everywhere(organism, 0.0, first=3, last=5))
    done = []
    for size in (1, 3, 64):
        with applied(organism, recipe):
            done.append([c.ids for c in generate(organism, prompts, batch_size=size, sampling=Sampling(temperature=0))])
    assert done[0] == done[1] == done[2]


def test_several_at_one_head_multiply():
    model = build("llama")
    one, _ = steered(model, [Attend(at(1), 6.0, first=1, last=4)])
    two, log = steered(model, [Attend(at(1), 2.0, first=1, last=4), Attend(at(1), 3.0, first=1, last=4)])
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    apart, _ = steered(model, [Attend(at(1, head), 6.0, first=1, last=4) for head in range(4)])
    torch.testing.assert_close(one, apart, atol=1e-5, rtol=1e-5)
    assert log.mean_ratio(0) > 0
    assert log.mean_ratio(1) > 0
    inner = Recipe.of(model, [Attend(at(1), 3.0, first=1, last=4)])
    with applied(model, inner):  # one recipe inside another
        nested, _ = steered(model, [Attend(at(1), 2.0, first=1, last=4)])
    torch.testing.assert_close(one, nested, atol=1e-5, rtol=1e-5)


def test_it_goes_along_with_other_kinds():
    """As if each were applied around the other."""
    model = build("qwen3_moe")
    add, more = Add(Site(0, "resid_post"), torch.randn(32)), Reinforce.of((1, 2), 4.0)
    attend = Attend(at(1), 5.0, first=1, last=4)
    together, _ = steered(model, [add, attend, more])
    with applied(model, Recipe.of(model, [add, more])):
        around, _ = steered(model, [attend])
    torch.testing.assert_close(together, around)


def test_a_schedule_scales_the_logarithm():
    model = build("llama")
    halved = Scope("thinking", schedule=Schedule("linear", 0.5, 0.5, 1000))
    one, _ = steered(model, [Attend(at(1), 9.0, first=1, last=4)], scope=halved)
    two, _ = steered(model, [Attend(at(1), 3.0, first=1, last=4)], scope="thinking")
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    with pytest.raises(
        ValueError, match="An attend of strength 0 at L1.pattern is done or not: its scope can have no sc"
    ):
        steered(model, [Attend(at(1), 0.0)], scope=halved)
    controlled = Scope("thinking", controller=Controller(20.0))
    assert steered(model, [Attend(at(1), 3.0)], scope=controlled)[1].tokens == 5


def test_a_model_that_was_loaded_eager_is_scaled_too():
    model, edits = build("llama"), [Attend(at(1, 2), 4.0, first=1, last=4)]
    sdpa, _ = steered(model, edits)
    model.set_attn_implementation("eager")
    eager, _ = steered(model, edits)
    torch.testing.assert_close(sdpa, eager, atol=1e-5, rtol=1e-5)
    assert torch.equal(steered(model, everywhere(model, 1.0))[0], logits(model))
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_chunks_change_nothing(name, monkeypatch):
    model, edits = family(name), [Attend(at(1, 2), 4.0, first=1, last=4), Attend(at(2), 0.0, "thinking")]
    whole, log = steered(model, edits)
    monkeypatch.setattr(_interface, "_FEWEST_SCORES", 1)
    parts, other = steered(model, edits)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)
    assert log.tokens == other.tokens


def test_in_bfloat16_it_agrees_as_far_as_bfloat16_goes():
    edits = [Attend(at(1), 4.0, first=1, last=4)]
    fine, _ = steered(build("llama"), edits)
    coarse, _ = steered(build("llama", dtype=torch.bfloat16), edits)
    torch.testing.assert_close(coarse.float(), fine, atol=0.1, rtol=0.05)


def test_a_gradient_is_a_number_beside_pads():
    model = build("llama")
    ids, mask = torch.tensor([[0, 0, *IDS]]), torch.ones(1, 17, dtype=torch.long)
    mask[:, :2] = 0
    with applied(model, Recipe.of(model, everywhere(model, 0.0))):
        model(ids, attention_mask=mask).logits[:, 2:].square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_implementation_is_restored_even_after_an_error():
    model = build("llama")
    recipe, plain = Recipe.of(model, everywhere(model)), logits(model)
    with applied(model, recipe):
        assert model.config._attn_implementation == _interface.NAME
        logits(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="in the middle"), applied(model, recipe):
        raise RuntimeError("in the middle")
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), plain)
    assert not any(part in _interface._SESSIONS for part in model.modules())


def test_a_recipe_goes_through_its_files(organism, tmp_path):
    edits = [Attend(at(2, 3), 4.0, "thinking", 2, 9), Attend(at(1), 0.0)]
    Recipe.of(organism, edits, scope="answer").save(tmp_path / "r")
    again = Recipe.load(tmp_path / "r")
    assert [step.intervention for step in again.steps] == edits
    assert [type(again.steps[0].intervention.last), again.steps[1].intervention.last] == [int, None]
    assert again.table().rows[0] == (0, "attend", "L2H3.pattern", "answer", 4.0)
    words = yaml.safe_load((tmp_path / "r" / "recipe.yaml").read_text())
    own = words["steps"][0]
    assert own == {
        "kind": "attend", "scope": "answer", "site": "L2H3.pattern", "strength": 4.0, "keys": "thinking", "first": 2,
        "last": 9,
    }  # fmt: skip
    for key, value, sentence in (
        ("last", 1.5, "last 1.5, which is no whole number"), ("keys", "all", "Known: prompt, thinking, answer"),
        ("first", 9, "which are none"), ("strength", -1, "Give 0 or more"), ("site", "L2.z", "such as L3.pattern"),
    ):  # fmt: skip
        (tmp_path / "r" / "recipe.yaml").write_text(yaml.safe_dump({**words, "steps": [{**own, key: value}]}))
        with pytest.raises(ValueError, match=sentence):
            Recipe.load(tmp_path / "r")


@pytest.mark.parametrize(("site", "more", "sentence"), [
    (Site(1, "z"), {}, "An attend acts on what heads attend to, such as L3.pattern, not at L1.z."),
    (at(1), {"strength": -0.5}, "The attend at L1.pattern has strength -0.5. Give 0 or more."),
    (at(1), {"strength": float("inf")}, "The attend at L1.pattern has strength inf"),
    (at(1), {"strength": float("nan")}, "The attend at L1.pattern has strength nan"),
    (at(1), {"first": 3, "last": 3}, "The attend at L1.pattern has keys 3 to 3 of the prompt, which are none."),
    (at(1), {"first": -1}, "has keys -1 to None of the prompt"),
    (at(1), {"last": 2**40}, "which are none"),
    (at(1), {"keys": "all"}, "keys='all' is not known. Known: 'prompt', 'thinking', 'answer'."),
])  # fmt: skip
def test_what_cannot_be_is_refused(site, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        Attend(site, **{"strength": 2.0, **more})


def test_what_the_model_has_not_is_refused(organism):
    with pytest.raises(IndexError, match="Head 8 is out of range: layer 1 has heads 0 to 7"):
        Recipe.of(organism, [Attend(at(1, 8), 2.0)]).check(organism)
    with pytest.raises(IndexError, match="Layer 4 is out of range"):
        Recipe.of(organism, [Attend(at(4), 2.0)]).check(organism)
    hybrid = load(tiny_model("lfm2_moe"), tokenizer=build_tokenizer())
    with pytest.raises(ValueError, match="Layer 0 of this lfm2_moe has no attention heads"):
        Recipe.of(hybrid, [Attend(at(0), 2.0)]).check(hybrid)
    for call in (lambda: tap_of(organism, at(1)), lambda: sites_in(organism, "pattern")):
        with pytest.raises(ValueError, match="pattern is who attends to whom, which is never held whole: read what a"):
            call()
    with pytest.raises(ValueError, match="L1H2.pattern is who attends to whom"), captured(organism, [at(1, 2)]):
        pass
    with pytest.raises(ValueError, match="pattern is not split into experts"):
        Site(1, "pattern", expert=2)


@pytest.mark.parametrize(("model_type", "sentence"), [
    ("falcon", "No layer of this falcon attends through transformers' AttentionInterface"),
    ("diffllama", "Layer 0 of this diffllama attends more than once in a pass"),
    ("deepseek_v32", "Layer 0 of this deepseek_v32 gives its attention indices"),
])  # fmt: skip
def test_a_family_that_attends_otherwise_is_refused(model_type, sentence):
    model = load(tiny_model(model_type), tokenizer=build_tokenizer())
    former = model.config._attn_implementation
    with pytest.raises(ValueError, match=sentence):
        steered(model, [Attend(at(0), 2.0)])
    assert model.config._attn_implementation == former


def test_it_is_no_matter_of_weights(organism, tmp_path):
    recipe = Recipe.of(organism, [Attend(at(1, 2), 2.0)])
    for call in (folded, check_folds):
        with pytest.raises(NotFoldable, match="L1H2.pattern is scaled for some keys alone, and no weights tell which"):
            call(organism, recipe)
    with pytest.raises(ValueError, match="attend at L1.pattern, scope all.* cannot be written as"):
        export_recipe(Recipe.of(organism, [Attend(at(1), 2.0)]), tmp_path / "v.gguf", "gguf", model=organism)
    assert scaled(recipe, 2.0).steps[0].intervention.strength == 4.0


def test_it_says_where_it_touched_nothing():
    model = build("llama")
    with pytest.raises(NeverFired, match="touched no token: attend at L1.pattern, scope prompt"):
        steered(model, [Attend(at(1), 2.0, "thinking")], scope="prompt")


def test_a_base_model_has_a_prompt_by_its_positions():
    """Without delimiters nothing tells where it ends: a region of it must say so."""
    model = load(build("llama"), tokenizer=build_tokenizer(words=("<pad>", "<bos>", "<eos>"), template=None))
    assert steered(model, [Attend(at(1), 2.0, first=1, last=4)])[1].tokens == 14
    with pytest.raises(ValueError, match="delimiter"):
        steered(model, [Attend(at(1), 2.0)])


def test_a_turn_that_opens_makes_all_before_it_prompt():
    """Of rows that go on in a cache, as in one pass; rows move meanwhile, and take their columns along."""
    model = build("llama")
    ids = torch.tensor([[*IDS, 2, 1, 9, 5, 3, 21]])
    places = [("prompt", 3, 11), ("thinking", 0, None), ("answer", 0, None)]

    def told(ends):
        clock, regions, start = Clock.of(model), Regions(places), 0
        for end in ends:
            regions.begin(clock.advance(ids[:, start:end], None, start))
            start = end
        return [regions.keys(place, ids.shape[1])[0].nonzero().flatten().tolist() for place in places]

    assert told([21]) == told(range(1, 22)) == told([9, 21]) == [list(range(3, 11)), [19, 20], []]
    clock, regions = Clock.of(model), Regions(places)
    run = object()
    first, second = Rows(run, (0, 1), (4, 4)), Rows(run, (2,), (2,), joining=True)
    regions.begin(
        clock.advance(torch.tensor([[0, 7, 5, 3], [1, 7, 5, 3]]), torch.tensor([[0, 1, 1, 1], [1] * 4]), 0, first)
    )
    regions.begin(clock.advance(torch.tensor([[5, 3]]), None, 0, second))
    both = Rows(run, (2, 1), (4, 4), n_past=4)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    regions.begin(clock.advance(torch.tensor([[20], [21]]), mask, 4, both))
    assert regions.keys(places[1], 5).int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    narrow = Rows(run, (2,), (2,), n_past=3)
    regions.begin(clock.advance(torch.tensor([[22]]), None, 3, narrow))
    assert regions.keys(places[1], 4).int().tolist() == [[0, 1, 1, 1]]
    assert regions.keys(places[1], 2).int().tolist() == [[1, 1]]
    assert regions.keys(places[1], 6).int().tolist() == [[0, 1, 1, 1, 0, 0]]
