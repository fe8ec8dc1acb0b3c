"""The log says which tokens a recipe touched, and how hard; a recipe that touched none is an error."""

import pytest
import torch
from families import build
from transformers import LogitsProcessorList

from probes.model.delimiters import Delimiters
from probes.model.hooks import captured
from probes.model.loading import load, tokenizer_of
from probes.model.sites import Site
from probes.thinking.phases import Clock
from steer.interventions.activation import Ablate, Add, Rotate
from steer.recipes.condition import Condition
from steer.recipes.controller import Controller, Schedule
from steer.recipes.recipe import Recipe, Step
from steer.recipes.scope import Scope
from steer.runtime._applied import NeverFired, applied

SITE = Site(1, "resid_post")
# <bos> 1, <eos> 2, <think> 3, </think> 4, header 5; markers 20 and 21 22; a step ends at 30
MARKERS = ((20,), (21, 22))
PROMPTS = ([1, 7, 8, 20, 5], [1, 6, 5])  # a marker in a prompt is none
WRITES = ([3, 11, 30, 20, 12, 21, 22, 13, 4, 14, 2], [15, 3, 30, 21, 12, 4, 20, 2])  # then pads until both have ended
EXPECTED = {
    # positions in the row's own tokens; the shorter row's end is read, the longer one's is not
    "all": (Scope(), [*range(15)], [*range(11)]),
    "prompt": (Scope("prompt"), [0, 1, 2, 3, 4], [0, 1, 2, 3]),
    "thinking": (Scope("thinking"), [*range(5, 13)], [4, 5, 6, 7]),
    "answer": (Scope("answer"), [13, 14], [8, 9, 10]),
    "token ids": (Scope(tokens=(11, 12, 8)), [2, 6, 9], [7]),
    "steps": (Scope("thinking", tokens=(30,)), [7], [5]),
    "after the first marker": (Scope("thinking", after=1, markers=MARKERS), [8, 9, 10, 11, 12], []),
    "after the second marker": (Scope("thinking", after=2, markers=MARKERS), [11, 12], []),
    "first half of 8": (Scope.first(0.5, budget=8), [5, 6, 7, 8], [4, 5, 6, 7]),
    "last half of 6": (Scope.last(0.5, budget=6), [8, 9, 10, 11, 12], [7]),
    "a schedule": (Scope("thinking", schedule=Schedule("linear", 1, 0, 4)), [*range(5, 13)], [4, 5, 6, 7]),
    "closed loop": (Scope("thinking", controller=Controller(3)), [*range(5, 13)], [4, 5, 6, 7]),
}


def random_vector(width=32, seed=2):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def scripted(width):
    def force(input_ids, scores):
        step = input_ids.shape[1] - width
        scores = torch.full_like(scores, -torch.inf)
        for row, script in enumerate(WRITES):
            scores[row, script[min(step, len(script) - 1)]] = 0
        return scores

    return LogitsProcessorList([force])


def write(model, recipe, *, use_cache=True, steps=12, **options):
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in PROMPTS])
    with torch.no_grad(), applied(model, recipe, **options) as fired:
        model.generate(
            ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, use_cache=use_cache,
            logits_processor=scripted(width), pad_token_id=0,
        )  # fmt: skip
    return fired


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("name", EXPECTED)
def test_exactly_these_positions_are_touched_while_decoding(name, use_cache):
    scope, *expected = EXPECTED[name]
    model = build("llama")
    fired = write(model, Recipe.of(model, [Add(SITE, random_vector())], scope=scope), use_cache=use_cache)
    assert fired.positions() == expected


def test_a_condition_touches_the_rows_whose_prompt_is_above_it_from_the_header_on():
    model, site, vector = build("llama"), Site(0, "resid_post"), random_vector(seed=5)
    means = []
    for prompt in PROMPTS:
        with torch.no_grad(), captured(model, [site]) as cache:
            model(torch.tensor([prompt]))
        means.append(float((cache[site][0] @ (vector / vector.norm())).mean()))
    between = sum(means) / 2
    for above in (True, False):
        scope = Scope(condition=Condition(site, vector, between, above))
        fired = write(model, Recipe.of(model, [Add(SITE, random_vector())], scope=scope))
        for row, mean in enumerate(means):
            assert bool(fired.positions()[row]) == ((mean > between) == above)
            if fired.positions()[row]:
                assert fired.positions()[row][0] == len(PROMPTS[row]) - 1


def test_ratios_and_counts_are_those_of_the_formula():
    model, vector = build("llama"), random_vector()
    steps = (
        Step(Add(Site(0, "resid_pre"), vector, 0.5), Scope("thinking", schedule=Schedule("linear", 1, 0, 4))),
        Step(Ablate(Site(0, "resid_pre"), vector), Scope("prompt")),
        Step(Rotate(Site(2, "mlp_out"), vector, 3.0)),
    )
    ids = torch.tensor([[1, 7, 8, 5, 3, 9, 10, 4, 11]])
    recipe = Recipe(steps, Recipe.of(model, []).model)
    with torch.no_grad(), captured(model, [Site(0, "resid_pre")]) as cache:
        model(ids)
    x = cache[Site(0, "resid_pre")][0]
    with torch.no_grad(), applied(model, recipe) as fired:
        model(ids)
    unit = vector / vector.norm()
    weights = torch.tensor([1, 0.75, 0.5])
    expected = {
        (0, "thinking"): (0.5 * vector.norm() * weights / x[4:7].norm(dim=1), 4, 6),
        (1, "prompt"): ((x[:4] @ unit).abs() / x[:4].norm(dim=1), 0, 3),
    }
    frame = fired.to_frame().set_index(["step", "phase"])
    for key, (ratio, first, last) in expected.items():
        row = frame.loc[key]
        assert (row["tokens"], row["first"], row["last"]) == (len(ratio), first, last)
        assert row["mean ratio"] == pytest.approx(float(ratio.mean()), rel=1e-5)
        assert row["max ratio"] == pytest.approx(float(ratio.max()), rel=1e-5)
    assert frame.loc[2]["tokens"].tolist() == [4, 3, 2]
    assert "step" in fired._repr_html_()


def test_a_recipe_that_touched_nothing_is_an_error_unless_told_otherwise():
    model = build("llama")
    recipe = Recipe.of(model, [Add(SITE, random_vector())], scope=Scope("thinking", tokens=(90,)))
    sentence = "touched no token: add at L1.resid_post, scope thinking, at ids .90,.. Did the model run"
    with pytest.raises(NeverFired, match=sentence):
        write(model, recipe)
    assert write(model, recipe, must_fire=False).table().rows == (
        (0, "L1.resid_post", "add", "thinking, at ids (90,)", "never", 0, 0.0, 0.0, "", ""),
    )
    with pytest.raises(ZeroDivisionError), applied(model, recipe):
        raise ZeroDivisionError  # the block's own error comes first


def test_several_sequences_for_a_prompt_are_rows_of_their_own():
    model = build("llama")
    ids = torch.tensor([[1, 7, 5, 3]])
    torch.manual_seed(0)
    recipe = Recipe.of(model, [Add(SITE, random_vector())], scope="thinking")
    with torch.no_grad(), applied(model, recipe) as fired:
        out = model.generate(ids, max_new_tokens=8, do_sample=True, num_return_sequences=3, pad_token_id=0)
    for row, touched in zip(out.tolist(), fired.positions(), strict=True):
        ends = [at for at, token in enumerate(row[:-1]) if token in (2, 4)]
        expected = range(3, ends[0] if ends and row[ends[0]] == 4 else ends[0] + 1 if ends else len(row) - 1)
        if 5 not in row[4:] and 3 not in row[4:]:
            assert touched == list(expected)


def test_where_a_pad_is_also_the_end_the_first_of_a_run_is_the_end():
    model = build("llama")
    tokenizer = tokenizer_of(model)
    tokenizer.pad_token = tokenizer.eos_token
    model = load(model, tokenizer=tokenizer, delimiters=Delimiters((3,), (4,), (5,), (1,)))
    ids = torch.tensor([[1, 7, 5, 3, 8, 4, 9, 2, 2, 2], [1, 7, 5, 3, 8, 8, 8, 8, 4, 9]])
    with torch.no_grad(), applied(model, Recipe.of(model, [Add(SITE, random_vector())], scope="answer")) as fired:
        model(ids)
    assert fired.positions() == [[5, 6, 7], [8, 9]]


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_new_turn_in_the_same_cache_counts_anew(chunk):
    turn = [1, 7, 5, 3, 20, 8, 20, 4, 9, 2]
    ids, thoughts, marks = torch.tensor([turn + turn]), [], []
    clock = Clock(Delimiters((3,), (4,), (5,), (1,)), markers=(((20,),),))
    for start in range(0, ids.shape[1], chunk):
        phases = clock.advance(ids[:, start : start + chunk], None, start)
        thoughts += phases.thought[0].tolist()
        marks += phases.marked[0][0].tolist()
    assert thoughts[10:] == thoughts[:10] == [-1, -1, -1, 0, 1, 2, 3, -1, -1, -1]
    assert marks[13:17] == marks[3:7] == [0, 1, 1, 2]


@pytest.mark.parametrize("shift", [-1e-3, 1e-3])
@pytest.mark.parametrize("ends", [(2,), (1, 2, 3, 4)])
def test_a_condition_is_judged_on_the_whole_prompt_however_it_is_cut(ends, shift):
    model, site, vector = build("llama"), Site(0, "resid_post"), random_vector(seed=5)
    ids = torch.tensor([[1, 7, 8, 20, 5, 3, 11]])
    with torch.no_grad(), captured(model, [site]) as cache:
        model(ids)
    mean = float((cache[site][0, :5] @ (vector / vector.norm())).mean())
    scope = Scope(condition=Condition(site, vector, mean + shift))
    with (
        torch.no_grad(),
        applied(model, Recipe.of(model, [Add(SITE, random_vector())], scope=scope), must_fire=False) as fired,
    ):
        past = None
        for start, end in zip((0, *ends), (*ends, 7), strict=True):
            past = model(ids[:, start:end], past_key_values=past, use_cache=True).past_key_values
    assert fired.positions()[0] == ([4, 5, 6] if shift < 0 else [])
