"""A recipe is the same in a file as in memory, does what its formulas say, and leaves the model as it was."""

import math

import pytest
import torch
import yaml
from families import build

from probes.hooks import captured
from probes.sites import Site
from steer.interventions import Ablate, Add, Clamp
from steer.recipes import Recipe, Step, applied

V, U = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
STEPS = [
    Add(Site(0, "resid_post"), V, 0.3),
    Ablate(Site(1, "result", 2), U, 0.9, target=-0.4),
    Clamp(Site(2, "attn_out"), V, low=-0.1),
    Clamp(Site(2, "mlp_out"), U, 0.5, low=-1.0, high=0.0),
]


@pytest.fixture
def saved(tmp_path):
    model = build("qwen3")
    recipe = Recipe(Recipe.of(model, STEPS).steps[:3] + (Step(STEPS[3], "thinking"),), Recipe.of(model, []).model, "m")
    recipe.save(tmp_path / "r")
    return model, recipe, tmp_path / "r"


@torch.no_grad()
def test_a_file_holds_the_whole_recipe(saved, tokens):
    model, recipe, folder = saved
    again = Recipe.load(folder)
    assert (again.model, again.method) == (recipe.model, "m")
    for ours, theirs in zip(recipe.steps, again.steps, strict=True):
        assert ours.scope == theirs.scope
        assert type(ours.intervention) is type(theirs.intervention)
        for name, value in vars(ours.intervention).items():
            other = getattr(theirs.intervention, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert again.steps[2].intervention.high == math.inf
    with applied(model, recipe):
        first = model(tokens).logits
    with applied(model, again):
        assert torch.equal(model(tokens).logits, first)
    assert again.to_frame()["site"].tolist() == ["L0.resid_post", "L1H2.result", "L2.attn_out", "L2.mlp_out"]
    assert "L1H2.result" in again._repr_html_()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.update(note=1), "has unknown keys: note. Known: format, method, model, steps"),
        (lambda w: w.pop("method"), "lacks keys: method"),
        (lambda w: w.update(format="thinksteer recipe 9"), "has format 'thinksteer recipe 9', and this version reads"),
        (lambda w: w["model"].update(x=1), "model in .* has unknown keys: x"),
        (lambda w: w["steps"][0].update(colour=1), "Step 0 in .* has unknown keys: colour"),
        (lambda w: w["steps"][1].update(kind="boost"), "Step 1 in .* has kind 'boost'. Known: add, ablate, clamp"),
        (lambda w: w["steps"][1].update(scope="later"), "Step 1 in .* has scope 'later'. Known: all, prompt"),
        (lambda w: w["steps"][1].update(site="L1"), "'L1' is not a site"),
        (lambda w: w["steps"].pop(), "recipe.safetensors has unknown keys: 3.vector"),
        (lambda w: w["steps"].append(w["steps"][0]), "recipe.safetensors lacks keys: 4.vector"),
    ],
)
def test_what_the_file_should_not_hold_is_refused_by_name(saved, change, sentence):
    _, _, folder = saved
    words = yaml.safe_load((folder / "recipe.yaml").read_text())
    change(words)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(words))
    with pytest.raises(ValueError, match=sentence):
        Recipe.load(folder)


def test_a_file_runs_no_code_and_a_truncated_one_is_refused(saved, tmp_path):
    _, _, folder = saved
    whole = (folder / "recipe.safetensors").read_bytes()
    (folder / "recipe.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="recipe.safetensors is not a whole safetensors file .* It may be truncated"):
        Recipe.load(folder)
    (folder / "recipe.yaml").write_text(f"!!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(ValueError, match="recipe.yaml is not YAML"):
        Recipe.load(folder)
    assert not (tmp_path / "made").exists()
    with pytest.raises(FileNotFoundError, match="holds no recipe.yaml: it is not a recipe"):
        Recipe.load(tmp_path)
    with pytest.raises(FileExistsError, match="exists. Name another output folder"):
        saved[1].save(folder)


def test_a_recipe_made_for_another_model_is_refused(saved, tokens):
    _, recipe, _ = saved
    other, family = build("qwen3", seed=1), build("llama")
    sentence = "was made for the model 'Qwen3ForCausalLM', not for .*: fingerprint"
    with pytest.raises(ValueError, match=sentence), applied(other, recipe):
        other(tokens)
    with pytest.raises(ValueError, match="model_type qwen3 there, llama here"):
        recipe.check(family)
    same = build("qwen3", dtype=torch.bfloat16)
    recipe.check(same)  # another dtype is the same model


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(tokens, fails):
    model = build("gemma2")
    plain = model(tokens).logits
    steps = [Add(Site(1, "resid_post"), torch.ones(5 if fails else 32)), Ablate(Site(0, "mlp_out"), U)]
    try:
        with applied(model, Recipe.of(model, steps)):
            assert not torch.equal(model(tokens).logits, plain)
        assert not fails
    except Exception:
        assert fails
    assert torch.equal(model(tokens).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Add, Ablate, Clamp])
def test_strength_zero_changes_nothing(model, tokens, kind):
    bounds = {"low": 5.0} if kind is Clamp else {}
    plain = model(tokens).logits
    with applied(model, Recipe.of(model, [kind(Site(1, "resid_post"), V, 0.0, **bounds)])):
        torch.testing.assert_close(model(tokens).logits, plain, atol=1e-6, rtol=0)


@torch.no_grad()
def test_each_does_to_the_projection_what_its_formula_says(tokens):
    model, site, unit = build("llama"), Site(1, "resid_mid"), V / V.norm()

    def along(*steps):
        with applied(model, Recipe.of(model, steps)), captured(model, [site]) as cache:
            model(tokens)
        return cache[site] @ unit

    plain = along()
    torch.testing.assert_close(along(Add(site, V, 0.5)), plain + 0.5 * V.norm(), atol=1e-5, rtol=0)
    torch.testing.assert_close(along(Ablate(site, V)), torch.zeros_like(plain), atol=1e-5, rtol=0)
    torch.testing.assert_close(along(Ablate(site, V), Ablate(site, V)), torch.zeros_like(plain), atol=1e-5, rtol=0)
    torch.testing.assert_close(along(Ablate(site, V, 0.25)), 0.75 * plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(along(Ablate(site, V, target=2.0)), torch.full_like(plain, 2.0), atol=1e-5, rtol=0)
    bounded = along(Clamp(site, V, low=-0.1, high=0.2))
    torch.testing.assert_close(bounded, plain.clamp(-0.1, 0.2), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="A clamp needs low <= high, but got low=1.0 and high=0.0"):
        Clamp(site, V, low=1.0, high=0.0)


@torch.no_grad()
def test_steps_at_one_site_compose_in_order(tokens):
    model, site = build("llama"), Site(1, "resid_post")
    unit = V / V.norm()
    outs = []
    for steps in ([Add(site, V), Ablate(site, V)], [Ablate(site, V), Add(site, V)]):
        with applied(model, Recipe.of(model, steps)), captured(model, [site]) as cache:
            model(tokens)
        outs.append(cache[site] @ unit)
    torch.testing.assert_close(outs[0], torch.zeros(2, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(outs[1], V.norm().expand(2, 7), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("step", STEPS)
def test_an_activation_is_never_written_into_and_keeps_its_dtype(step):
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    before = x.clone()
    assert step(x).dtype is torch.bfloat16
    assert torch.equal(x, before)
