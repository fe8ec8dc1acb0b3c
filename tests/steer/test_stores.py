"""An evaluation with a store goes on where it stopped, and never takes one arm's completions for another's."""

import pytest
import torch

from probes import Sampling, load
from probes.model.sites import Site
from steer.decoding.budgets import Budget
from steer.decoding.prompts import PromptStyle
from steer.evaluation import _evaluate as scores
from steer.evaluation._evaluate import evaluate
from steer.evaluation.nulls import random_recipe
from steer.folding._fold import folded
from steer.interventions.activation import Ablate, Add, Scale
from steer.recipes.recipe import Recipe
from steer.recipes.scope import Scope
from steer.tasks.named import task_named

TASK = task_named("chains")
PROBLEMS = TASK.sample(12, "select")


@pytest.fixture(scope="module")
def organism():
    return load("organism")


def add(model, strength, seed=1, scope="thinking"):
    vector = torch.randn(96, generator=torch.Generator().manual_seed(seed))
    return Recipe.of(model, [Add(Site(1, "resid_post"), vector, strength)], scope=scope)


def run(model, arms, store, **words):
    sampling = Sampling.of(model, max_new_tokens=24)
    return evaluate(model, TASK, PROBLEMS, arms, sampling=sampling, batch_size=4, store=store, **words)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_lost_is_made_again_and_what_is_held_is_not(organism, tmp_path, monkeypatch):
    arms = {"one": add(organism, 0.5), "two": add(organism, 2.0), "budget": Budget(3, 3)}
    whole = run(organism, arms, tmp_path / "a", samples=2)
    assert run(organism, arms, None, samples=2).to_dict() == whole.to_dict()
    calm = contents(tmp_path / "a")
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 4
    files[0].unlink()
    cut = files[1].read_bytes()
    files[1].write_bytes(cut[: len(cut) // 2])
    made, solve = [], scores.generate

    def counted(*args, **kwargs):
        before = kwargs["store"].read_text().count("\n") if kwargs["store"].exists() else 0
        done = solve(*args, **kwargs)
        made.append(len(done) - before)
        return done

    monkeypatch.setattr(scores, "generate", counted)
    assert run(organism, arms, tmp_path / "a", samples=2).to_dict() == whole.to_dict()
    assert contents(tmp_path / "a") == calm
    assert sorted(made)[:2] == [0, 0]
    assert sorted(made)[3] == 24
    assert 0 < sorted(made)[2] < 24


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda m: add(m, 0.5), lambda m: add(m, 2.0)),
        (lambda m: add(m, 2.0), lambda m: add(m, 2.0, seed=2)),
        (lambda m: add(m, 20.0), lambda m: add(m, 20.0, scope="prompt")),
        (lambda _: Budget(3, 3), lambda _: Budget(9, 3)),
        (lambda _: PromptStyle(), lambda _: PromptStyle(thought="Okay")),
        (lambda _: None, lambda m: add(m, 2.0)),
    ],
    ids=["strength", "vector", "scope", "control", "prompt", "plain"],
)
def test_one_name_for_two_arms_is_two_files(organism, tmp_path, first, second):
    made = [run(organism, {"arm": arm(organism)}, tmp_path).arms["arm"] for arm in (first, second)]
    alone = run(organism, {"arm": second(organism)}, None).arms["arm"]
    assert (made[1].length == alone.length).all()
    assert (made[0].length != made[1].length).any()
    assert len(list(tmp_path.glob("arm-*"))) == 2


def test_a_model_that_was_changed_takes_nothing_of_what_it_was(organism, tmp_path):
    before = run(organism, {}, tmp_path).arms["plain"]
    twin = folded(organism, Recipe.of(organism, [Scale(Site(0, "result", head), 0.0) for head in range(8)]))
    after = run(twin, {}, tmp_path).arms["plain"]
    assert (before.length != after.length).any()
    assert len(list(tmp_path.iterdir())) == 2


def test_another_models_store_is_refused_by_name(organism, tmp_path):
    run(organism, {}, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace('"model": "organism"', '"model": "other"'))
    with pytest.raises(ValueError, match="was written by the model 'other', not by 'organism'. Name another file."):
        run(organism, {}, tmp_path)


def test_a_null_keeps_all_but_the_directions(organism):
    vector, other = torch.randn(2, 96, generator=torch.Generator().manual_seed(0)).unbind()
    steps = [
        Add(Site(1, "resid_post"), vector, 2.0),
        Ablate(Site(1, "result", 3), vector, 0.5),
        Add(Site(2, "mlp_out"), other, 1.0),
    ]
    recipe = Recipe.of(organism, steps, scope=Scope("thinking", window=(0, 4)))
    null, again, third = (random_recipe(recipe, seed=seed) for seed in (0, 0, 1))
    assert null.fingerprint() == again.fingerprint() != third.fingerprint()
    for a, b in zip(recipe.steps, null.steps, strict=True):
        assert (a.scope, a.intervention.site, a.intervention.strength) == (
            b.scope,
            b.intervention.site,
            b.intervention.strength,
        )
        assert torch.allclose(a.intervention.vector.norm(), b.intervention.vector.norm())
        assert abs(torch.cosine_similarity(a.intervention.vector, b.intervention.vector, dim=0)) < 0.4
    assert torch.equal(null.steps[0].intervention.vector, null.steps[1].intervention.vector)


def test_a_recipe_without_a_vector_has_no_null(organism):
    with pytest.raises(ValueError, match="No step of the recipe has a vector"):
        random_recipe(Recipe.of(organism, [Scale(Site(0, "result", 1), 0.5)]), seed=0)
