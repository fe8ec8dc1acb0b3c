"""A recipe carries the birth of each direction: by value, in its folder, the card, the LoRA card; sums keep both."""

import json

import pytest
import torch
import yaml
from families import build

from probes.directions import Direction, difference_in_means, direction_between, random_direction
from probes.generation import Completion, Sampling, generate
from probes.model import load
from probes.thinking import first_thought, thinking
from steer import Ablate, Add, Clamp, Condition, Recipe, Rotate, Scope, export
from steer.evaluation.nulls import random_recipe
from steer.folding import export_adapter
from steer.recipes import Step

A, B = ["a 3 b +4", "a 1 b *7"], ["a 9 b -2", "a 5 b +1", "a 2 b +2"]
SITE = "L1.attn_out"


@pytest.fixture(scope="module")
def model():
    return load("organism")


@pytest.fixture(scope="module")
def completions(model) -> list[Completion]:
    return generate(model, [f"a {i} b +3 c *7" for i in range(8)], sampling=Sampling.of(model, seed=5))


@pytest.fixture(scope="module")
def both(model, completions) -> tuple[Direction, Direction]:
    """Two directions at one site, of other data, read elsewhere."""
    texts = direction_between(model, A, B, SITE, position="text_last")
    site = texts.site
    spans = difference_in_means(
        model, [thinking(c) for c in completions[:5]], [thinking(c) for c in completions[5:]], [site]
    )
    return texts, spans[site]


def test_a_birth_says_where_the_spans_were_read_and_what_seed_wrote_them(both, completions, model):
    texts, spans = (d.provenance for d in both)
    assert (texts.position, texts.seed, texts.n_positive, texts.n_negative) == ("text_last", None, 2, 3)
    assert (spans.position, spans.seed, spans.n_positive, spans.n_negative) == ("thinking", 5, 5, 3)
    mixed = difference_in_means(model, [thinking(completions[0])], [first_thought(completions[1])], [both[0].site])
    assert mixed[both[0].site].provenance.position == "first and thinking"


def test_arithmetic_keeps_both_parents(both):
    a, b = both
    birth = (a - 0.5 * b).provenance
    assert birth.parents[0] == a.provenance
    minus = birth.parents[1]
    assert minus.parents[0].parents[0] == b.provenance
    assert (birth.n_positive, birth.n_negative, birth.seed) == (7, 6, None)
    assert birth.position == "text_last and thinking"
    assert birth.estimator == "(difference in means) + (-1 (0.5 (difference in means)))"


def test_every_constructor_keeps_the_birth(both):
    direction = both[0]
    made = [Add.of(direction, 2.0), Ablate.of(direction), Clamp.of(direction, low=0.0), Rotate.of(direction, 1.0)]
    assert all(x.birth == direction.provenance for x in (*made, Condition.of(direction, 0.1)))
    assert [torch.equal(x.vector, direction.vector) for x in made] == [False, True, True, False]
    assert torch.equal(Add.of(direction, 1.0, units="raw").vector, direction.vector)


def test_a_recipe_file_gives_the_births_back_by_value(both, model, tmp_path):
    a, b = both
    scope = Scope("all", condition=Condition.of(b, 0.5))
    steps = (Step(Add.of(a + b, 1.0), scope), Step(Ablate.of(a)), Step(Ablate.of(a, 0.5)))
    recipe = Recipe(steps, Recipe.of(model, []).model, "test")
    recipe.save(tmp_path / "r")
    again = Recipe.load(tmp_path / "r")
    assert [s.intervention.birth for s in again.steps] == [(a + b).provenance, a.provenance, a.provenance]
    assert again.steps[0].scope.condition.birth == b.provenance
    assert again.fingerprint() == recipe.fingerprint()
    words = yaml.safe_load((tmp_path / "r" / "recipe.yaml").read_text())
    assert len(words["births"]) == 3  # each once
    assert [step.get("birth") for step in words["steps"]] == [0, 2, 2]
    table = again.births_table()
    assert [row[0] for row in table.rows] == ["step 0", "parent of step 0", "parent of step 0", "step 0", "steps 1, 2"]
    assert {a.provenance.data, b.provenance.data} <= {row[5] for row in table.rows}


@pytest.mark.parametrize("write", [export, export_adapter])
def test_the_cards_of_exports_tell_the_births_of_a_sum(both, model, write, tmp_path):
    a, b = both
    recipe = Recipe.of(model, [Ablate.of(a + b)])
    write(model, recipe, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    whole = (a + b).provenance
    for birth in (whole, a.provenance, b.provenance):
        line = next(line for line in card.splitlines() if f"| {birth.data} |" in line)
        for cell in (birth.estimator, birth.position, f"{birth.n_positive}, {birth.n_negative}", model_of(birth)):
            assert f"| {cell} |" in line
    assert f"| {b.provenance.seed} |" in card
    assert Recipe.load(tmp_path / "out" / "recipe").steps[0].intervention.birth == whole


def model_of(birth) -> str:
    return f"{birth.model['name']} ({birth.model['fingerprint']})"


def test_a_direction_file_gives_back_a_birth_with_parents(both, tmp_path):
    whole = both[0] + random_direction(both[1], seed=3)
    whole.save(tmp_path / "d.safetensors")
    again = Direction.load(tmp_path / "d.safetensors")
    assert again.provenance == whole.provenance
    assert again.provenance.parents[1].seed == 3
    assert again.provenance.parents[1].parents == (both[1].provenance,)


def test_a_null_is_born_of_what_it_stands_beside(both, model):
    birth = both[0].provenance
    (step,) = random_recipe(Recipe.of(model, [Ablate.of(both[0])]), seed=4).steps
    assert step.intervention.birth.parents == (birth,)
    assert (step.intervention.birth.seed, step.intervention.birth.data) == (4, birth.data)
    assert step.intervention.birth.estimator == "random direction of the norm of (difference in means)"


def test_files_of_version_0_1_load_without_births(both, tmp_path):
    model = build("llama")
    vector = torch.randn(32)
    Recipe.of(model, [Add.of(both[0], 1.0)])
    recipe = Recipe.of(model, [Ablate(both[0].site, vector), Add(both[0].site, vector)])
    recipe.save(tmp_path / "r")
    path = tmp_path / "r" / "recipe.yaml"
    words = yaml.safe_load(path.read_text())
    words["format"] = "thinksteer recipe 1"
    assert words.pop("births") == []
    path.write_text(yaml.safe_dump(words, sort_keys=False))
    again = Recipe.load(tmp_path / "r")
    assert again.fingerprint() == recipe.fingerprint()
    assert again.births == ()
    assert json.dumps(again.model) == json.dumps(recipe.model)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w["steps"][0].update(birth=7), "Step 0 in .* has birth 7, but the recipe has 1 births"),
        (lambda w: w["steps"][0].update(birth="x"), "Step 0 in .* has birth 'x'"),
        (lambda w: w["births"][0].update(who=1), "Birth 0 in .* has unknown keys: who"),
        (lambda w: w["births"][0].pop("data"), "Birth 0 in .* lacks keys: data"),
        (lambda w: w["births"][0].update(parents=[{"who": 1}]), "A parent in birth 0 in"),
        (lambda w: w.update(births=3), "has births 3, which is no list"),
    ],
)
def test_a_malformed_birth_is_refused_by_name(both, model, change, sentence, tmp_path):
    Recipe.of(model, [Ablate.of(both[0])]).save(tmp_path / "r")
    path = tmp_path / "r" / "recipe.yaml"
    words = yaml.safe_load(path.read_text())
    change(words)
    path.write_text(yaml.safe_dump(words))
    with pytest.raises(ValueError, match=sentence):
        Recipe.load(tmp_path / "r")
