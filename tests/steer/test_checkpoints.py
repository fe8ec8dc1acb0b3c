"""An export is a plain checkpoint that does what the recipe does, says what was changed, and is whole or not there."""

import json
import re
import signal
import subprocess
import sys

import gguf
import pytest
import safetensors
import torch
from families import build
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import steer.folding._export
from probes.model.loading import ORGANISM, load, tokenizer_of
from probes.model.sites import Site
from probes.tables import Table
from steer.checkpoints._diff import diff
from steer.checkpoints.card import Section, write_card
from steer.folding._export import export
from steer.folding._fold import declare_bias
from steer.folding.draft import NotFoldable
from steer.interventions.activation import Ablate, Add, Clamp
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied

HEAD = Site.parse("L0H2.result")
EDITED = ["model.layers.0.self_attn.o_proj.bias", "model.layers.0.self_attn.o_proj.weight"]


def random_vector(width, seed=2):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def shifted(model):
    """A recipe that folds into weight and bias."""
    vector = random_vector(model.config.hidden_size)
    return Recipe.of(model, [Ablate(HEAD, vector, target=0.7)], method="a test")


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def exported(organism, tmp_path_factory):
    """The folder, and the difference that `export` gave."""
    folder = tmp_path_factory.mktemp("exports") / "edited"
    return folder, export(organism, shifted(organism), folder, sections=[Section("Why", "Because.")])


@torch.no_grad()
def steered(model, recipe, ids):
    with applied(model, recipe):
        return model(ids).logits


def raw(folder):
    """The bytes of each tensor, with dtype and shape, read without any library."""
    data = (folder / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    cut = lambda h: data[begin + h["data_offsets"][0] : begin + h["data_offsets"][1]]  # noqa: E731
    return {name: (h["dtype"], h["shape"], cut(h)) for name, h in header.items()}


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@torch.no_grad()
def test_plain_transformers_loads_it_and_it_does_what_the_recipe_does(organism, exported):
    folder, _ = exported
    twin, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.randint(6, twin.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = steered(organism, shifted(organism), ids)
    torch.testing.assert_close(twin(ids).logits, expected, atol=1e-5, rtol=0)
    assert (expected - organism(ids).logits).abs().max() > 0.1
    said = [{"role": "user", "content": "a 3 b +4"}]
    assert tokenizer.apply_chat_template(said) == tokenizer_of(organism).apply_chat_template(said)
    assert twin.generation_config.to_diff_dict() == organism.generation_config.to_diff_dict()
    assert not list(folder.rglob("*.py"))
    assert "auto_map" not in (folder / "config.json").read_text()


@pytest.mark.parametrize(("family", "arch"), [("llama", "LLAMA"), ("qwen3", "QWEN3"), ("olmoe", "OLMOE")])
def test_every_tensor_of_an_export_has_a_name_in_llama_cpp(family, arch, tmp_path):
    """Biases that an edit adds included: its converter, which the package gguf does not hold, goes by these names."""
    model = build(family)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    export(model, Recipe.of(model, [Ablate(Site(1, "result", 2), vector, target=0.5)]), tmp_path / "out")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch), model.config.num_hidden_layers)
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        written = list(file.keys())
    assert any(name.endswith("o_proj.bias") for name in written)
    unknown = [name for name in written if names.get_name(name, (".weight", ".bias")) is None]
    assert [name for name in unknown if ".experts." not in name] == []  # the converter stacks experts itself


def test_the_recipe_lies_beside_it_as_the_file_that_travels(organism, exported, tmp_path):
    Recipe.load(exported[0] / "recipe").save(tmp_path / "reread")
    shifted(organism).save(tmp_path / "ours")
    for name in ("recipe.yaml", "recipe.safetensors"):
        assert (tmp_path / "reread" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_the_card_tells_what_was_done_to_what(exported):
    card = (exported[0] / "README.md").read_text()
    assert card.startswith("---\nbase_model: organism\n")
    told = ("Made with ThinkSteer: a test.", "## Why\n\nBecause.", "| L0H2.result | all |", *EDITED)
    assert [words for words in told if words not in card] == []


def test_untouched_tensors_are_the_same_bytes_and_the_others_are_named_with_their_rank(exported):
    folder, changes = exported
    before, after = raw(ORGANISM), raw(folder)
    assert before.keys() == after.keys()
    assert sorted(name for name in before if before[name] != after[name]) == EDITED
    assert changes == diff("organism", folder)
    assert changes.compared == len(before)
    assert [(t.name, t.status, t.rank) for t in changes.tensors] == [(name, "changed", 1) for name in EDITED]


@torch.no_grad()
def test_a_family_that_can_declare_a_bias_gets_one_for_a_shift(tokens, tmp_path):
    model = build("llama")
    declare_bias(model).save_pretrained(tmp_path / "declared")
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "declared")
    torch.testing.assert_close(same(tokens).logits, model(tokens).logits, atol=1e-6, rtol=0)

    changes = export(model, shifted(model), tmp_path / "edited")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    torch.testing.assert_close(twin(tokens).logits, steered(model, shifted(model), tokens), atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "edited" / "config.json").read_text())["attention_bias"] is True
    assert not model.config.attention_bias
    changed = [t.name for t in changes.tensors if t.status == "changed"]
    added = [t.name for t in changes.tensors if t.status == "only in B"]
    assert changed == [EDITED[1]]
    assert sorted(changed + added) == changes.names
    held = load_file(tmp_path / "edited" / "model.safetensors")
    assert [name for name in added if held[name].any()] == [EDITED[0]]
    assert all(re.search(r"self_attn\.[qkvo]_proj\.bias$", name) for name in added)
    assert len(added) == 4 * model.config.num_hidden_layers


@torch.no_grad()
def test_a_model_that_lies_in_no_folder_is_exported_and_compared_too(tokens, tmp_path):
    model = build("llama")
    recipe = Recipe.of(model, [Ablate(HEAD, random_vector(32))])
    changes = export(model, recipe, tmp_path / "edited")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    torch.testing.assert_close(twin(tokens).logits, steered(model, recipe, tokens), atol=1e-5, rtol=0)
    assert [(t.name, t.status, t.rank) for t in changes.tensors] == [(EDITED[1], "changed", 1)]
    assert changes.compared == len(raw(tmp_path / "edited"))
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


@torch.no_grad()
@pytest.mark.parametrize(
    "places",
    ["L1H2.result L1H2.result", "L1.z L1.z", "L1.z L1H2.z", "L1.attn_out L1.attn_out", "L1.mlp_out L1.mlp_out"],
)
def test_several_edits_of_one_matrix_are_exported_in_their_run_time_order(places, tokens, tmp_path):
    """They do not commute."""
    model, edits = build("llama+bias"), []
    for seed, place in enumerate(places.split()):
        edits.append(Ablate(Site.parse(place), random_vector(8 if place == "L1H2.z" else 32, seed), target=1.0))
    recipe = Recipe.of(model, edits)
    export(model, recipe, tmp_path / "edited")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    torch.testing.assert_close(twin(tokens).logits, steered(model, recipe, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "edit", "sentence"),
    [
        ("mistral", Ablate(HEAD, torch.ones(32), target=0.7), "The config of mistral cannot declare a bias for o_proj"),
        ("llama", Clamp(HEAD, torch.ones(32), low=0.0), "A clamp at L0H2.result is not linear: keep it as a run-time"),
        ("llama", Add(Site(1, "resid_post"), torch.ones(32)), "L1.resid_post is not written by one matrix, but by the"),
    ],
)
def test_what_no_weights_equal_is_refused_and_leaves_no_folder(family, edit, sentence, tmp_path):
    model = build(family)
    with pytest.raises(NotFoldable, match=sentence):
        export(model, Recipe.of(model, [edit]), tmp_path / "edited")
    assert not files_in(tmp_path)


def test_a_recipe_of_another_model_is_refused_and_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="This recipe was made for the model 'LlamaForCausalLM', not for"):
        export(build("llama", seed=1), shifted(build("llama")), tmp_path / "edited")
    assert not files_in(tmp_path)


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    model = build("llama")
    (tmp_path / "edited").mkdir()
    (tmp_path / "edited" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="edited exists. Name another output folder, or remove it first."):
        export(model, shifted(model), tmp_path / "edited")
    assert files_in(tmp_path) == {"edited", "edited/mine"}


@pytest.mark.parametrize("last_word", [OSError("the disk is full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("part", ["write_card", "diff"])
def test_an_export_that_fails_midway_leaves_nothing(part, last_word, monkeypatch, tmp_path):
    model, seen = build("llama"), []

    def fail(*_, **__):
        seen.extend(files_in(tmp_path))
        raise last_word

    monkeypatch.setattr(steer.folding._export, part, fail)
    with pytest.raises(type(last_word)):
        export(model, shifted(model), tmp_path / "edited")
    assert any(name.endswith("model.safetensors") for name in seen)
    assert not files_in(tmp_path)


KILLED = """
import os, signal, sys, torch
import steer.folding._export
from probes.model.loading import load
from probes.model.sites import Site
from steer.interventions.activation import Ablate
from steer.recipes.recipe import Recipe
steer.folding._export.write_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
model = load("organism")
steer.folding._export.export(model, Recipe.of(model, [Ablate(Site(0, "result", 2), torch.ones(96))]), sys.argv[1])
"""


def test_an_export_that_is_killed_leaves_nothing_under_its_name(organism, tmp_path):
    folder = tmp_path / "edited"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not folder.exists()
    rests = [path.name for path in tmp_path.iterdir()]
    assert rests
    assert all(name.startswith(".edited.") and name.endswith(".partial") for name in rests)
    export(organism, shifted(organism), folder)
    assert folder.is_dir()


def test_a_cell_of_a_card_holds_any_text(tmp_path):
    """Delimiters of real models hold pipes, which part cells in Markdown."""
    table = Table(("token", "by"), (("<|im_end|>", 1.0), ("two\nlines", 2.0)))
    write_card(tmp_path / "README.md", "base", "a test", [Section("Tokens", "", table)])
    lines = [line for line in (tmp_path / "README.md").read_text().split("## Tokens")[1].splitlines() if line]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [3, 3, 3, 3]  # two cells each
