"""An export is an ordinary checkpoint that does what the recipe does, or there is no folder at all."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from families import build
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from probes.models import ORGANISM, load
from probes.sites import Site
from probes.tokens import encode_prompt
from steer import checkpoints
from steer.checkpoints import export
from steer.differences import diff
from steer.fold import NotFoldable
from steer.interventions import Ablate, Clamp
from steer.recipes import Recipe, applied

VECTOR = torch.randn(96, generator=torch.Generator().manual_seed(4))
O_PROJ = "model.layers.0.self_attn.o_proj"


def recipe_for(model, target=0.7):
    return Recipe.of(model, [Ablate(Site(0, "result", 2), VECTOR, target=target)], method="a test")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, folder = load("organism"), tmp_path_factory.mktemp("export") / "edited"
    changes = export(model, recipe_for(model), folder)
    return model, folder, changes


@torch.no_grad()
def test_plain_transformers_gives_the_run_time_recipes_logits(exported):
    model, folder, _ = exported
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chains = ("a 3 b +4 c *7 quick", "a 1 b -2 c +9 d *3", "a 9 b +1")
    for chain in chains:
        ids = torch.tensor([encode_prompt(tokenizer, chain)])
        with applied(model, recipe_for(model)):
            steered = model(ids).logits
        torch.testing.assert_close(plain(ids).logits, steered, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(ids).logits, steered, atol=1e-2)


def test_only_what_was_edited_differs_and_it_is_named(exported):
    _, folder, changes = exported
    assert changes.names == [f"{O_PROJ}.bias", f"{O_PROJ}.weight"]
    assert [tensor.rank for tensor in changes.tensors] == [1, 1]
    with safe_open(ORGANISM / "model.safetensors", "pt") as a, safe_open(folder / "model.safetensors", "pt") as b:
        assert set(a.keys()) == set(b.keys())
        same = {name for name in a.keys() if torch.equal(a.get_tensor(name), b.get_tensor(name))}  # noqa: SIM118
        assert set(a.keys()) - same == set(changes.names)


def test_the_folder_holds_its_recipe_and_its_card(exported):
    model, folder, _ = exported
    again = Recipe.load(folder / "recipe")
    assert torch.equal(again.steps[0].intervention.vector, VECTOR)
    again.check(model)
    card = (folder / "README.md").read_text()
    for words in ("a test", "L0H2.result", f"{O_PROJ}.weight", "Projection of the edited heads", "organism"):
        assert words in card


def test_the_card_tells_the_projection_before_after_and_as_stored(exported):
    _, folder, _ = exported
    line = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| L0H2 |"))
    before, after, stored = (float(cell) for cell in line.strip("| ").split("|")[1:])
    with safe_open(ORGANISM / "model.safetensors", "pt") as file:
        block = file.get_tensor(f"{O_PROJ}.weight")[:, 32:48]
    assert before == pytest.approx(float((VECTOR / VECTOR.norm() @ block).norm()), rel=1e-3)
    assert max(after, stored) < 1e-6


@torch.no_grad()
def test_a_bias_is_declared_in_the_config_where_a_shift_needs_one(tmp_path):
    model = build("llama")
    recipe = Recipe.of(model, [Ablate(Site(1, "result", 3), torch.ones(32), target=0.5)])
    changes = export(model, recipe, tmp_path / "out")
    plain, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.tensor([[1, 7, 8, 9, 5]])
    with applied(model, recipe):
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert plain.config.attention_bias
    assert {t.status for t in changes.tensors if t.name.endswith(".bias")} == {"only in B"}
    assert [t.name for t in changes.tensors if t.status == "changed"] == ["model.layers.1.self_attn.o_proj.weight"]


def test_what_does_not_fold_leaves_no_folder(tmp_path):
    model, mistral = load("organism"), build("mistral")
    refused = [
        (model, Recipe.of(model, [Clamp(Site(0, "result", 2), VECTOR, low=0.0)]), NotFoldable, "is not linear"),
        (mistral, Recipe.of(mistral, [Ablate(Site(1, "result", 0), torch.ones(32), target=1.0)]), NotFoldable, "bias"),
        (model, recipe_for(build("llama")), ValueError, "was made for the model"),
    ]
    for subject, recipe, error, words in refused:
        with pytest.raises(error, match=words):
            export(subject, recipe, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_left_as_it_is(tmp_path):
    model = load("organism")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists. Name another output folder, or remove it first."):
        export(model, recipe_for(model), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("step", ["write_card", "_changes", "folded"])
def test_a_failed_export_leaves_nothing(monkeypatch, tmp_path, step):
    def fail(*_):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(checkpoints, step, fail)
    model = load("organism")
    with pytest.raises(RuntimeError, match="the disk is full"):
        export(model, recipe_for(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_folder_under_its_final_name(tmp_path):
    code = """
import os, signal, sys
import torch
from probes import Site, load
from steer import Ablate, Recipe, checkpoints
checkpoints.write_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
model = load("organism")
checkpoints.export(model, Recipe.of(model, [Ablate(Site(0, "result", 2), torch.ones(96))]), sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    model = load("organism")
    export(model, recipe_for(model), tmp_path / "out")
    assert diff("organism", tmp_path / "out").names == [f"{O_PROJ}.bias", f"{O_PROJ}.weight"]
