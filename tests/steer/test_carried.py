"""Weights that transformers does not load are carried into an export as they are, or named."""

import json
import shutil

import pytest
import torch
from families import SPECIAL, build, build_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from probes import Site, load
from steer import Ablate, Recipe, export
from steer.checkpoints import Checkpoint
from steer.deltas import Plan, WeightDelta, open_delta

EXTRA = ("model.layers.61.eh_proj.weight", "model.layers.61.enorm.weight")


@pytest.fixture
def source(tmp_path):
    """A checkpoint of DeepSeek-V3's family with one layer that predicts further tokens, which transformers ignores."""
    model, folder = build("deepseek_v3"), tmp_path / "source"
    model.config.num_nextn_predict_layers = 1
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    extra = {EXTRA[0]: torch.randn(32, 64).bfloat16(), EXTRA[1]: torch.randn(32)}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, extra


def edited(source, out):
    model = load(source)
    recipe = Recipe.of(model, [Ablate(Site(1, "result", 2), torch.ones(32))])
    export(model, recipe, out)
    return model, recipe


def test_what_transformers_ignores_is_carried_over_bit_for_bit(source, tmp_path):
    folder, extra = source
    edited(folder, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    for name, tensor in extra.items():
        assert torch.equal(written.read(name), tensor)
        assert written.read(name).dtype == tensor.dtype
    assert written.config["num_nextn_predict_layers"] == 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not set(EXTRA) & set(again.state_dict())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(EXTRA) < set(index["weight_map"])


def test_what_cannot_be_carried_is_named_and_no_longer_promised(source, tmp_path):
    folder, extra = source
    tensors = load_file(folder / "model.safetensors")
    named = {name: "model-00001-of-00001.safetensors" for name in tensors}
    tensors[EXTRA[1]] = extra[EXTRA[1]].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))
    with pytest.warns(UserWarning, match=r"2 tensors of .*model.layers.61.eh_proj.weight, are not in the export"):
        edited(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert not set(EXTRA) & Checkpoint.open(tmp_path / "out").places.keys()


def test_a_model_without_a_folder_has_nothing_to_carry(tmp_path):
    model = build("deepseek_v3")
    export(model, Recipe.of(model, [Ablate(Site(1, "result", 2), torch.ones(32))]), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_adapter_without_tensors_is_refused(tmp_path):
    adapter, target = tmp_path / "adapter", tmp_path / "target"
    model = build("llama")
    model.save_pretrained(target)
    build_tokenizer().save_pretrained(target)
    adapter.mkdir()
    words = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (adapter / "adapter_config.json").write_text(json.dumps(words))
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter is an adapter without tensors: it changes nothing"):
        open_delta(adapter)
    build_tokenizer((*SPECIAL, "another")).save_pretrained(tmp_path / "other")
    shutil.copy(target / "model.safetensors", tmp_path / "other")
    shutil.copy(target / "config.json", tmp_path / "other")
    delta = WeightDelta.between(tmp_path / "other", tmp_path / "other").selected(only=["embed_tokens"])
    with pytest.raises(ValueError, match="changes no tensor of .*target|no tensor"):
        Plan.of(target, delta)
