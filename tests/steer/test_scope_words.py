"""A scope says in a file what it is, and refuses what it is not."""

from dataclasses import replace

import pytest
import torch
import yaml
from families import SPECIAL, build, build_tokenizer

from probes.directions.direction import direction_between
from probes.model.loading import load, tokenizer_of
from probes.model.sites import Site
from probes.tensors import read_tensors, write_tensors
from steer.interventions.activation import Add, Rotate, Scale
from steer.recipes.condition import Condition
from steer.recipes.controller import Controller, Schedule
from steer.recipes.recipe import Recipe, Step
from steer.recipes.scope import Scope
from steer.runtime._applied import applied

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(2))
GAUGE = Site(0, "resid_post")
SCOPES = (
    Scope(),
    Scope("answer"),
    Scope("prompt", tokens=(7, 8)),
    Scope("thinking", after=2, markers=((20,), (21, 22))),
    Scope("thinking", window=(2, None), schedule=Schedule("cosine", 1.0, -0.25, 12)),
    Scope("thinking", window=(0, 9), controller=Controller(12, 3.0)),
    Scope(condition=Condition(GAUGE, VECTOR, 0.25, above=False)),
    Scope("thinking", controller=Controller(12, 3.0, GAUGE, -VECTOR, 7.5), condition=Condition(GAUGE, VECTOR, 0.1)),
)
IDS = torch.tensor([[1, 7, 8, 5, 3, 9, 20, 10, 21, 22, 11, 12, 4, 13], [1, 9, 9, 9, 5, 3, 20, 20, 8, 9, 4, 7, 8, 6]])


@torch.no_grad()
def test_every_scope_is_read_as_it_was_written_and_does_the_same(tmp_path):
    model = build("llama")
    steps = [Step(Add(Site(1, "resid_post"), VECTOR, 0.5), scope) for scope in SCOPES]
    steps += [Step(Rotate(Site(2, "mlp_out"), VECTOR, 0.5)), Step(Scale(Site(1, "z", 2), 0.5), SCOPES[4])]
    for i, step in enumerate(steps):
        recipe = Recipe((step,), Recipe.of(model, []).model)
        recipe.save(tmp_path / str(i))
        again = Recipe.load(tmp_path / str(i))
        ours, theirs = (r.steps[0].scope.to_dict() for r in (recipe, again))
        assert ours[0] == theirs[0]
        assert ours[1].keys() == theirs[1].keys()
        assert all(torch.equal(ours[1][name], theirs[1][name]) for name in ours[1])
        results = []
        for r in (recipe, again):
            with applied(model, r, must_fire=False) as fired:
                results.append((model(IDS).logits, fired.positions()))
        assert torch.equal(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]
        assert str(step.scope) in recipe._repr_html_()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.update(phase="late"), "Step 0 in .* has phase 'late'. Known: all, prompt, thinking, answer."),
        (lambda s: s.update(until=3), "The scope of Step 0 in .* has unknown keys: until. Known: phase, tokens, after"),
        (lambda s: s.update(window=[4, 2]), r"The window \(4, 2\) of thinking positions is empty."),
        (lambda s: s.update(window=3), "The scope of Step 0 in .* is malformed"),
        (
            lambda s: s.update(phase="answer"),
            "window is about the thinking: give it with phase='thinking', not 'answer'",
        ),
        (lambda s: s.update(after=1), "after counts markers: give both a number above 0 and the markers, or neither."),
        (
            lambda s: s["schedule"].update(shape="sine"),
            "Step 0 in .* has shape 'sine'. Known: linear, cosine, step.",
        ),
        (lambda s: s["schedule"].pop("over"), "schedule of the scope of Step 0 in .* lacks keys: over."),
        (
            lambda s: s["schedule"].update(over=[1]),
            r"schedule of the scope of Step 0 .* has over \[1\], which is no number",
        ),
        (lambda s: s.update(schedule=4), "schedule of the scope of Step 0 in .* is 4, which is no mapping."),
    ],
)
def test_a_scope_that_could_not_have_been_written_is_refused(tmp_path, change, sentence):
    model = build("llama")
    Recipe.of(model, [Add(GAUGE, VECTOR)], scope=SCOPES[4]).save(tmp_path / "r")
    path = tmp_path / "r" / "recipe.yaml"
    words = yaml.safe_load(path.read_text())
    change(words["steps"][0]["scope"])
    path.write_text(yaml.safe_dump(words))
    with pytest.raises(ValueError, match=sentence):
        Recipe.load(tmp_path / "r")


def test_a_condition_whose_vector_is_missing_is_refused(tmp_path):
    model = build("llama")
    Recipe.of(model, [Add(GAUGE, VECTOR)], scope=SCOPES[6]).save(tmp_path / "r")
    tensors, _ = read_tensors(tmp_path / "r" / "recipe.safetensors")
    write_tensors(tmp_path / "r" / "recipe.safetensors", {"0.vector": tensors["0.vector"]})
    with pytest.raises(ValueError, match="condition of the scope of Step 0 in .* has no vector"):
        Recipe.load(tmp_path / "r")


def test_markers_and_steps_are_looked_for_in_the_vocabulary():
    tokenizer = build_tokenizer((*SPECIAL, "Wait", "Hmm", "step\n\n"))
    model = load(build("llama"), tokenizer=tokenizer)
    assert Scope.at_steps(model, "\n\n").tokens == (8,)
    assert Scope.after_marker(model, 2, ["Wait", "Alternatively"]).markers == ((6,),)
    with pytest.raises(ValueError, match="No token of .* holds '%%', so steps cannot be told by it. Name another"):
        Scope.at_steps(model, "%%")
    with pytest.raises(ValueError, match="The vocabulary has none of the markers 'Alternatively': name others."):
        Scope.after_marker(model, 1, ["Alternatively"])
    with pytest.raises(ValueError, match="A share of a budget is above 0 and at most 1, but got 2 of 10 tokens."):
        Scope.first(2, budget=10)


def test_the_organism_has_its_own_markers():
    scope = Scope.after_marker(load("organism"), 1)
    assert scope.markers


@pytest.mark.parametrize(
    ("scope", "sentence"),
    [
        (replace(SCOPES[6], condition=Condition(Site(2, "resid_post"), VECTOR, 0.0)), "which is computed after it"),
        (
            replace(SCOPES[6], condition=Condition(GAUGE, VECTOR[:5], 0.0)),
            "has 5 entries, but the activation there has 32",
        ),
        (replace(SCOPES[6], condition=Condition(GAUGE, 0 * VECTOR, 0.0)), "is zero, so there is no direction"),
        (replace(SCOPES[6], condition=Condition(Site(9, "z"), VECTOR, 0.0)), "Layer 9 is out of range"),
    ],
)
def test_a_gauge_that_cannot_be_read_is_refused(scope, sentence):
    model = build("llama")
    recipe = Recipe.of(model, [Add(Site(1, "resid_post"), VECTOR)], scope=scope)
    with pytest.raises((ValueError, IndexError), match=sentence), applied(model, recipe):
        pass


def test_a_condition_needs_to_know_where_the_prompt_ends():
    plain = build("llama")
    tokenizer = tokenizer_of(plain)
    tokenizer.chat_template = None
    model = load(plain, tokenizer=tokenizer, delimiters=("<think>", "</think>"))
    recipe = Recipe.of(model, [Add(Site(1, "resid_post"), VECTOR)], scope=SCOPES[6])
    with pytest.raises(ValueError, match="A condition is judged at the end of the prompt, but"), applied(model, recipe):
        pass


def test_a_model_without_delimiters_is_steered_everywhere_and_refused_a_phase():
    plain = build("llama")
    tokenizer = build_tokenizer(("<pad>", "<bos>", "<eos>"), template=None)
    model = load(plain, tokenizer=tokenizer)
    with torch.no_grad(), applied(model, Recipe.of(model, [Add(GAUGE, VECTOR)])) as fired:
        model(IDS)
    assert fired.to_frame()["phase"].tolist() == ["all"]
    with pytest.raises(ValueError, match="has thinking delimiters"):
        applied(model, Recipe.of(model, [Add(GAUGE, VECTOR)], scope="thinking")).__enter__()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Schedule("linear", 1, 0, 0), "A schedule runs over a number of tokens above 0, but got over=0."),
        (lambda: Controller(0), "A controller needs a set-point above 0 thinking tokens, but got 0."),
        (lambda: Controller(5, site=GAUGE), "A controller that predicts needs both a site and a vector"),
        (lambda: replace(SCOPES[7], condition=Condition(Site(1, "z"), VECTOR, 0)),
         "A condition and a controller of one scope must read one site."),
    ],
)  # fmt: skip
def test_parts_of_a_scope_refuse_what_makes_no_sense(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_phase_that_is_none_is_refused():
    with pytest.raises(ValueError, match="'late' is no scope. Known: all, prompt, thinking, answer."):
        Scope.of("late")


def test_schedules_are_their_formulas():
    t = torch.tensor([0, 3, 6, 12, 20])
    expected = {
        "linear": [1, 0.75, 0.5, 0, 0],
        "cosine": [1, 0.8535534, 0.5, 0, 0],
        "step": [1, 1, 1, 0, 0],
    }
    for shape, values in expected.items():
        torch.testing.assert_close(Schedule(shape, 1, 0, 12).at(t), torch.tensor(values, dtype=torch.float32))
    assert Controller(10, 4.0).at(torch.tensor([0, 9, 10, 11, 40])).tolist() == pytest.approx([1, 0.4, 0, -0.4, -1])


def test_a_condition_is_made_from_a_direction():
    model = build("llama")
    direction = direction_between(model, ["w7"], ["w8"], "L1.resid_post")
    condition = Condition.of(direction, 2.0, above=False)
    assert (condition.site, condition.threshold, condition.above) == (direction.site, 2.0, False)
    assert torch.equal(condition.vector, direction.vector)
