"""An edit recipe as a weight delta: added, dialled and stored it is the folded model, number for number."""

import pytest
import torch
from families import build
from safetensors.torch import load_file
from typer.testing import CliRunner

from probes.model.loading import load, tokenizer_of
from probes.model.sites import Site
from steer.cli.weights.vector import app
from steer.deltas._add import add
from steer.deltas.dial import dialled
from steer.deltas.recipe import recipe_delta
from steer.deltas.stored import save
from steer.folding._fold import folded
from steer.folding.draft import NeedsBias, NotFoldable
from steer.interventions.activation import Ablate, Add, Scale
from steer.interventions.routing import Forbid, Reinforce
from steer.recipes.recipe import Recipe


def vector(width, seed=0):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def recipe_for(model):
    return Recipe.of(
        model,
        [
            Ablate(Site.parse("L1H2.result"), vector(32)),
            Scale(Site.parse("L0H1.z"), 0.3),
            Scale(Site.parse("L2.mlp_out"), 0.5),
        ],
    )


@pytest.fixture(params=["llama", "gpt2", "mixtral", "gpt_oss", "qwen3_moe"])
def place(request, tmp_path):
    model = build(request.param)
    model.save_pretrained(tmp_path / "model")
    tokenizer_of(model).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_added_or_dialled_it_is_the_folded_model_and_touches_nothing_else(place, tmp_path):
    model = load(place)
    recipe = recipe_for(model)
    delta = recipe_delta(model, recipe)
    folded(model, recipe).save_pretrained(tmp_path / "folded")
    plan = add(place, delta, tmp_path / "added")
    wanted, made, old = (load_file(f / "model.safetensors") for f in (tmp_path / "folded", tmp_path / "added", place))
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    assert set(plan.names) == {name for name in old if not torch.equal(old[name], wanted[name])}
    twin = folded(model, recipe).state_dict()
    with dialled(model, delta, 1.0):
        assert all(torch.equal(tensor, twin[name]) for name, tensor in model.state_dict().items())


def test_half_the_strength_is_half_the_edit():
    model = build("llama")
    whole = recipe_delta(model, Recipe.of(model, [Ablate(Site.parse("L1.attn_out"), vector(32), 1.0)]))
    half = recipe_delta(model, Recipe.of(model, [Ablate(Site.parse("L1.attn_out"), vector(32), 0.5)]))
    assert whole.names == half.names == ("model.layers.1.self_attn.o_proj.weight",)
    torch.testing.assert_close((0.5 * whole).tensor(whole.names[0]), half.tensor(half.names[0]), rtol=1e-4, atol=1e-7)
    assert torch.linalg.matrix_rank(whole.tensor(whole.names[0]), rtol=1e-4) == 1


def test_in_bfloat16_it_is_rounded_once(tmp_path):
    model = build("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    recipe = recipe_for(model)
    add(tmp_path / "model", recipe_delta(model, recipe), tmp_path / "added")
    folded(model, recipe).save_pretrained(tmp_path / "folded")
    made, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("added", "folded"))
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)


def test_what_no_weights_equal_is_refused():
    model = build("llama")
    with pytest.raises(NotFoldable, match="not written by one matrix"):
        recipe_delta(model, Recipe.of(model, [Ablate(Site.parse("L1.resid_post"), vector(32))]))
    with pytest.raises(NeedsBias, match="has no bias to hold a shift"):
        recipe_delta(model, Recipe.of(model, [Add(Site.parse("L1H2.result"), vector(32))]))
    with pytest.raises(ValueError, match="made for the model"):
        recipe_delta(build("llama", seed=1), recipe_for(model))
    with pytest.raises(ValueError, match="an edit is no file"):
        save(recipe_delta(model, recipe_for(model)), "nowhere", linked=True)


def test_the_command_makes_a_delta_of_a_recipe_and_draws_it(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer_of(model).save_pretrained(tmp_path / "model")
    recipe_for(load(tmp_path / "model")).save(tmp_path / "recipe")
    for words in (
        ["make", "recipe", "model", "-o", "delta"],
        ["add", "model", "delta", "-o", "out"],
        ["show", "delta", "--against", "delta", "--figure", "show.html"],
    ):
        words = [str(tmp_path / word) if word in PLACES else word for word in words]
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    twin = folded(load(tmp_path / "model"), recipe_for(load(tmp_path / "model"))).state_dict()
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(made[name], twin[name], rtol=0, atol=1e-7) for name in made)
    text = (tmp_path / "show.html").read_text()
    assert "self_attn.o_proj" in text
    assert "src=" not in text.split("<body>")[0]


PLACES = ("recipe", "model", "delta", "out", "show.html")


@pytest.mark.parametrize(
    ("family", "edit"),
    [
        ("gpt_oss", Reinforce.of((1, 2), 16.0)),
        ("qwen3_moe", Reinforce.of((2, 1), 16.0)),
        ("deepseek_v3", Forbid.of((1, 3))),  # in a buffer
    ],
    ids=str,
)
def test_a_routing_edit_is_a_delta_too(family, edit, tmp_path):
    model = build(family)
    recipe = Recipe.of(model, [edit])
    model.save_pretrained(tmp_path / "model")
    tokenizer_of(model).save_pretrained(tmp_path / "model")
    add(tmp_path / "model", recipe_delta(model, recipe), tmp_path / "added")
    folded(model, recipe).save_pretrained(tmp_path / "folded")
    made, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("added", "folded"))
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
