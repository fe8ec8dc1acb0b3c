"""An adapter is right when plain peft, with none of our code, makes the model do what the recipe does."""

import json
import subprocess
import sys

import pytest
import torch
from families import build
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import steer.folding.export_lora
from probes.model.architectures import head_matrices, o_proj_bias, o_proj_of
from probes.model.loading import ORGANISM, load
from probes.model.sites import Site
from steer.checkpoints.card import Section
from steer.folding._fold import folded
from steer.folding.draft import NotFoldable
from steer.folding.export_lora import export_adapter, low_rank
from steer.interventions.activation import Ablate, Add, Clamp
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied

HEADS = [(0, 1), (0, 3), (2, 2)]


def unit(model, layer):
    vector = torch.randn(len(head_matrices(model, 0)), generator=torch.Generator().manual_seed(layer + 2))
    return vector / vector.norm()


def thinkedit(model, heads=HEADS, weight=1.0, target=0.0):
    """ThinkEdit's edit, `project` or `replace`: the heads of one layer share v̂."""
    edits = [Ablate(Site(layer, "result", head), unit(model, layer), weight, target) for layer, head in heads]
    return Recipe.of(model, edits, method="a test")


def fresh(model, folder):
    """Another process's view of the base model: saved, and read by plain transformers."""
    if not folder.exists():
        model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits(model, ids, recipe=None):
    if recipe is None:
        return model(ids).logits
    with applied(model, recipe):
        return model(ids).logits


def near(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def check_parity(model, recipe, tmp_path, *, checkpoint=True, merges=True):
    """adapter = merged adapter = edited checkpoint = run time, on plain peft; and that is not the plain model."""
    ids = torch.randint(6, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    export_adapter(model, recipe, tmp_path / "adapter")
    expected = logits(model, ids, recipe)
    assert float((expected - logits(model, ids)).abs().max()) > 1e-2
    adapted = PeftModel.from_pretrained(fresh(model, tmp_path / "base"), tmp_path / "adapter")
    near(logits(adapted, ids), expected)
    if checkpoint:
        near(logits(folded(model, recipe), ids), expected)
    if merges:
        near(logits(adapted.merge_and_unload(), ids), expected)


@pytest.mark.parametrize(
    "family", ["llama", "llama+bias", "qwen3", "qwen3_moe", "gpt2", "granite", "gemma2", "deepseek_v3", "gpt_oss"]
)
@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_adapter_merged_checkpoint_and_run_time_agree(family, weight, tmp_path):
    model = build(family)
    check_parity(model, thinkedit(model, weight=weight), tmp_path)


def test_they_agree_on_the_organism_too(tmp_path):
    model = load("organism")
    check_parity(model, thinkedit(model), tmp_path)


@pytest.mark.parametrize(
    "edits",
    [
        [Ablate(Site(1, "attn_out"), torch.arange(32.0))],
        [Ablate(Site(1, "z"), torch.arange(32.0)), Ablate(Site(0, "z", 2), torch.arange(8.0), 0.7)],
        [Ablate(Site(1, name), torch.arange(32.0) + i) for i, name in enumerate(("z", "attn_out"))],
        [Ablate(Site(1, "result", 1), torch.arange(32.0)), Ablate(Site(1, "result", 1), torch.ones(32))],
    ],
    ids=["attn_out", "z", "both", "two directions of one head"],
)
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_any_edit_of_o_proj_alone_is_an_adapter(family, edits, tmp_path):
    model = build(family)
    check_parity(model, Recipe.of(model, edits), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_thinkedits_edit_is_v_times_v_w_on_the_chosen_columns(family, dtype):
    """ΔW = -v̂ (v̂ᵀ W), rank 1 in each layer with edited heads, in float32 whatever the model's dtype."""
    model = build(family, dtype=dtype)
    layers = low_rank(model, thinkedit(model))
    assert {layer: change.rank for layer, change in layers.items()} == {0: 1, 2: 1}
    for layer, change in layers.items():
        v, heads = unit(model, layer), [head for where, head in HEADS if where == layer]
        weight = head_matrices(model, layer).float()
        expected = torch.zeros_like(weight)
        expected[:, heads] = -torch.einsum("d,e,ehk->dhk", v, v, weight)[:, heads]
        torch.testing.assert_close(change.b @ change.a, expected.flatten(1), atol=1e-6, rtol=0)
        torch.testing.assert_close((change.b.T @ v).abs(), torch.ones(1), atol=1e-5, rtol=0)
        assert not change.a.unflatten(1, weight.shape[1:])[:, [h for h in range(4) if h not in heads]].any()


def test_only_the_layers_that_change_are_in_the_adapter_and_its_scaling_is_one(tmp_path):
    model = build("qwen3")
    changes = export_adapter(model, thinkedit(model), tmp_path / "adapter")
    d_model, d_in = o_proj_of(model, 0).weight.shape
    paths = [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 2)]
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {"lora_A.weight": (1, d_in), "lora_B.weight": (d_model, 1)}
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == {
        f"base_model.model.{path}.{part}": shape for path in paths for part, shape in shapes.items()
    }
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    words = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (words["r"], words["lora_alpha"], words["bias"], words["lora_bias"]) == (1, 1, "none", False)
    assert (words["target_modules"], words["task_type"], words["peft_type"]) == (paths, "CAUSAL_LM", "LORA")
    assert not words["use_rslora"]
    weights = [f"{path}.weight" for path in paths]
    assert [(t.name, t.rank, t.status) for t in changes.tensors] == [(name, 1, "changed") for name in weights]
    assert changes.compared == len(list(model.parameters()))


@torch.no_grad()
def test_layers_of_different_rank_share_one_that_zeros_fill(tmp_path):
    model = build("llama")
    one, two = unit(model, 0), unit(model, 1)
    edits = [Ablate(Site(0, "result", 1), one), Ablate(Site(2, "result", 1), one), Ablate(Site(2, "result", 3), two)]
    recipe = Recipe.of(model, edits)
    assert {layer: change.rank for layer, change in low_rank(model, recipe).items()} == {0: 1, 2: 2}
    check_parity(model, recipe, tmp_path)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first = "base_model.model.model.layers.0.self_attn.o_proj"
    assert held[f"{first}.lora_A.weight"].shape == (2, 32)
    assert not held[f"{first}.lora_A.weight"][1].any()
    assert not held[f"{first}.lora_B.weight"][:, 1].any()


def test_a_direction_that_a_head_does_not_write_changes_nothing_and_is_no_layer():
    model = build("llama")
    with torch.no_grad():
        o_proj_of(model, 0).weight[7] = 0
    axis = torch.eye(32)[7]
    edits = [Ablate(Site(0, "result", 1), axis), Ablate(Site(1, "result", 1), axis)]
    assert list(low_rank(model, Recipe.of(model, edits))) == [1]


@pytest.mark.parametrize("family", ["llama+bias", "granite", "gpt2", "gpt_oss"])
def test_a_shift_is_held_and_merged_where_o_proj_has_a_bias(family, tmp_path):
    model = build(family)
    check_parity(model, thinkedit(model, target=0.7), tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but:UserWarning")
def test_a_shift_is_held_where_there_is_no_bias_and_peft_says_that_it_does_not_merge(family, tmp_path):
    """qwen2 and mistral cannot declare a bias: no checkpoint equals this recipe, and an adapter does."""
    model = build(family)
    assert o_proj_bias(model, 0) is None
    recipe = thinkedit(model, target=0.7)
    check_parity(model, recipe, tmp_path, checkpoint=family == "llama", merges=False)
    adapted = PeftModel.from_pretrained(fresh(model, tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True` because the base layer has"):
        adapted.merge_and_unload()
    assert "merges it only where `o_proj`" in (tmp_path / "adapter" / "README.md").read_text()
    assert not model.config.to_dict().get("attention_bias")
    assert o_proj_bias(model, 0) is None


def test_a_shift_alone_has_rank_0_and_is_an_adapter(tmp_path):
    model = build("llama+bias")
    recipe = Recipe.of(model, [Add(Site(1, "result", 2), torch.ones(32)), Add(Site(2, "attn_out"), torch.ones(32))])
    assert {layer: change.rank for layer, change in low_rank(model, recipe).items()} == {1: 0, 2: 0}
    check_parity(model, recipe, tmp_path)


def test_shifts_and_names_are_told_in_the_difference(tmp_path):
    path = "model.layers.0.self_attn.o_proj"
    for family, status in (("llama", "only in B"), ("llama+bias", "changed")):
        model = build(family)
        changes = export_adapter(model, thinkedit(model, [(0, 1)], target=0.7), tmp_path / family)
        assert [(t.name, t.status) for t in changes.tensors] == [
            (f"{path}.bias", status),
            (f"{path}.weight", "changed"),
        ]


def test_the_card_and_the_recipe_lie_beside_it(tmp_path):
    model = load("organism")
    recipe = thinkedit(model)
    export_adapter(model, recipe, tmp_path / "adapter", sections=[Section("Why", "Because.")])
    names = sorted(str(path.relative_to(tmp_path / "adapter")) for path in (tmp_path / "adapter").rglob("*"))
    assert names == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "recipe", "recipe/recipe.safetensors",
        "recipe/recipe.yaml",
    ]  # fmt: skip
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith("---\nbase_model: organism\nlibrary_name: peft\n")
    told = (
        "Made with ThinkSteer: a test. An ordinary LoRA adapter: it needs no",
        "## Why\n\nBecause.",
        "L0H1.result",
        "model.layers.2.self_attn.o_proj.weight",
        'AutoModelForCausalLM.from_pretrained("organism")',
    )
    assert [words for words in told if words not in card] == []
    assert "shift" not in card
    assert Recipe.load(tmp_path / "adapter" / "recipe").table() == recipe.table()


LOADED_PLAINLY = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
with torch.no_grad():
    torch.save(model(torch.tensor([[1, 10, 20, 30]])).logits, sys.argv[3])
assert not {"probes", "steer"} & sys.modules.keys()
"""


def test_it_loads_in_a_process_that_knows_none_of_our_code(tmp_path):
    model = load("organism")
    export_adapter(model, thinkedit(model), tmp_path / "adapter")
    words = [sys.executable, "-c", LOADED_PLAINLY, str(ORGANISM), str(tmp_path / "adapter"), str(tmp_path / "logits")]
    subprocess.run(words, check=True, cwd=tmp_path)
    near(torch.load(tmp_path / "logits"), logits(model, torch.tensor([[1, 10, 20, 30]]), thinkedit(model)))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            Ablate(Site(1, "mlp_out"), torch.ones(32)),
            r"The recipe changes model\.layers\.1\.mlp\.down_proj\.weight, and",
        ),
        (Clamp(Site(1, "result", 0), torch.ones(32), low=0.0), "A clamp at L1H0.result is not linear"),
        (Add(Site(1, "resid_post"), torch.ones(32)), "L1.resid_post is not written by one matrix, but by the whole"),
        (Ablate(Site(1, "result", 0), torch.ones(32), 0.0), "The recipe changes no o_proj, so there is no adapter"),
    ],
    ids=["mlp", "clamp", "stream", "nothing"],
)
def test_what_no_adapter_holds_is_refused_and_leaves_nothing(edit, sentence, tmp_path):
    model = build("llama")
    edits = [edit] if edit.strength == 0 else [Ablate(Site(0, "attn_out"), torch.ones(32)), edit]
    with pytest.raises(NotFoldable, match=sentence):
        export_adapter(model, Recipe.of(model, edits), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_a_recipe_with_a_scope_or_of_another_model_is_refused(tmp_path):
    model = build("llama")
    scoped = Recipe.of(model, [Ablate(Site(0, "attn_out"), torch.ones(32))], scope="thinking")
    with pytest.raises(NotFoldable, match="L0.attn_out is changed in scope 'thinking', but weights act on every token"):
        export_adapter(model, scoped, tmp_path / "adapter")
    with pytest.raises(ValueError, match="This recipe was made for the model 'LlamaForCausalLM', not for"):
        export_adapter(build("llama", seed=1), thinkedit(model), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    model = build("llama")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="adapter exists. Name another output folder, or remove it first."):
        export_adapter(model, thinkedit(model), tmp_path / "adapter")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["adapter", "adapter/mine"]


@pytest.mark.parametrize("last_word", [OSError("the disk is full"), KeyboardInterrupt()], ids=repr)
def test_an_export_that_fails_midway_leaves_nothing(last_word, monkeypatch, tmp_path):
    model, seen = build("llama"), []

    def fail(*_, **__):
        seen.extend(path.name for path in tmp_path.rglob("*"))
        raise last_word

    monkeypatch.setattr(steer.folding.export_lora, "write_card", fail)
    with pytest.raises(type(last_word)):
        export_adapter(model, thinkedit(model), tmp_path / "adapter")
    assert "adapter_model.safetensors" in seen
    assert not list(tmp_path.iterdir())


def test_without_peft_it_says_what_to_install_and_nothing_else_needs_it(monkeypatch, tmp_path):
    model = build("llama")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'thinksteer\[lora\]'"):
        export_adapter(model, thinkedit(model), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
    assert list(low_rank(model, thinkedit(model))) == [0, 2]


def test_the_model_is_left_as_it_was(tmp_path):
    model = build("mistral")
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    export_adapter(model, thinkedit(model, target=0.7), tmp_path / "adapter")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].data_ptr() == place for name, (place, _) in before.items())
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())
