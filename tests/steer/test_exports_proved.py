"""What is written is what was computed: each door reads back what it wrote, and keeps nothing that differs."""

import json

import pytest
import torch
from families import FAMILIES, UNLISTED_MOE, build
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import steer.checkpoints.stream as streaming
import steer.checkpoints.writing as writing
import steer.deltas.stored
import steer.folding.export_lora
from probes.model.loading import tokenizer_of
from probes.model.sites import Site
from steer.checkpoints.conversions import on_disk
from steer.checkpoints.proof import Meant, prove_written
from steer.checkpoints.reloading import prove_model
from steer.checkpoints.writing import write_model
from steer.deltas._add import add
from steer.deltas.delta import WeightDelta
from steer.deltas.stored import save
from steer.folding._export import export
from steer.folding.export_lora import export_adapter
from steer.interventions.activation import Ablate
from steer.recipes.recipe import Recipe

IDS = torch.tensor([[1, 7, 8, 5, 3, 9, 10, 4, 11]])


def cut(model, **more):
    return Recipe.of(model, [Ablate(Site(1, "result", 2), torch.ones(model.config.hidden_size), **more)])


def two(folder):
    """A checkpoint, and one that differs from it."""
    for name, seed in (("a", 0), ("b", 1)):
        model = build("llama", seed=seed)
        model.save_pretrained(folder / name)
        tokenizer_of(model).save_pretrained(folder / name)
    return folder / "a", folder / "b"


DOORS = {
    "export": lambda _, out: export(model := build("llama"), cut(model), out),
    "adapter": lambda _, out: export_adapter(model := build("llama"), cut(model), out),
    "add": lambda folder, out: add(two(folder)[0], WeightDelta.between(folder / "b", folder / "a"), out),
    "delta": lambda folder, out: save(WeightDelta.between(*two(folder)), out),
    "factors": lambda folder, out: save(WeightDelta.between(*two(folder)), out, rank=2),
}


def change(path, edit):
    """A safetensors file, in which one matrix is another."""
    with safe_open(path, framework="pt") as file:
        words = file.metadata()
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if tensors[name].dim() == 2)
    edit(tensors, name)
    save_file(tensors, path, words)


def flip(tensors, name):
    tensors[name].view(torch.uint8)[-1, -4] ^= 1  # the last bit of a number


def drop(tensors, name):
    del tensors[name]


def add_one(tensors, _name):
    tensors["model.layers.9.more.weight"] = torch.ones(2, 2)


def round_off(tensors, name):
    tensors[name] = tensors[name].to(torch.float16)


def turn(tensors, name):
    tensors[name] = tensors[name].T.contiguous()


FAULTS = {
    flip: "its numbers are others",
    drop: "it is not there",
    add_one: "nothing was meant to be there",
    round_off: "it is F16, and was meant to be F32",
    turn: r"it is \[\d+, \d+\], and was meant to be \[\d+, \d+\]",
}


@pytest.fixture
def spoiled(monkeypatch):
    """Every writer of tensors, with a fault that comes after it."""

    def spoil(edit):
        write_shard, write_tensors = streaming._write, steer.folding.export_lora.write_tensors
        save_weights = writing.save_weights

        def shard_written(path, *rest):
            digests = write_shard(path, *rest)
            change(path, edit)
            return digests

        def tensors_written(path, *rest):
            write_tensors(path, *rest)
            change(path, edit)

        def model_written(model, folder):
            save_weights(model, folder)
            change(folder / "model.safetensors", edit)

        monkeypatch.setattr(streaming, "_write", shard_written)
        monkeypatch.setattr(steer.folding.export_lora, "write_tensors", tensors_written)
        monkeypatch.setattr(writing, "save_weights", model_written)

    return spoil


@pytest.mark.parametrize("edit", FAULTS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("door", DOORS)
def test_a_writing_that_went_wrong_is_refused_by_name_and_leaves_nothing(door, edit, spoiled, tmp_path):
    spoiled(edit)
    with pytest.raises(ValueError, match=rf"\S+ was not written as it was computed: .* {FAULTS[edit]}"):
        DOORS[door](tmp_path, tmp_path / "out")
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("door", DOORS)
def test_what_was_written_well_passes(door, tmp_path):
    DOORS[door](tmp_path, tmp_path / "out")
    assert (tmp_path / "out").is_dir()


@torch.no_grad()
@pytest.mark.parametrize("family", {**FAMILIES, **UNLISTED_MOE})
def test_every_family_is_proved_and_one_bit_of_any_parameter_is_seen(family, tmp_path):
    model = build(family, dtype=torch.bfloat16)
    write_model(model, tmp_path)
    write_model(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "again")
    seen = set()
    for parameter in model.state_dict().values():
        if parameter.data_ptr() in seen:
            continue  # tied
        seen.add(parameter.data_ptr())
        whole = parameter.view(-1).view(torch.uint8)
        whole[-2] ^= 1
        with pytest.raises(ValueError, match="was not written as it was computed: .* its numbers are others"):
            prove_model(tmp_path, model)
        whole[-2] ^= 1
    prove_model(tmp_path, model)


def test_a_config_that_promises_another_model_is_seen(tmp_path):
    model = build("llama")
    write_model(model, tmp_path)
    for words, sentence in (
        (
            {"attention_bias": True},
            "k_proj.bias was not .* its config makes such a tensor, and the model has none",
        ),
        ({"vocab_size": 90}, r"its config makes it \[90, 32\], and it is \[97, 32\]"),
        ({"num_hidden_layers": 2}, "model.layers.2.* was not written .* its config makes no such tensor"),
    ):
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(json.dumps(json.loads(text) | words))
        with pytest.raises(ValueError, match=sentence):
            prove_model(tmp_path, model)
        (tmp_path / "config.json").write_text(text)


def test_a_link_that_reads_as_another_is_refused(monkeypatch, tmp_path):
    delta = WeightDelta.between(*two(tmp_path))
    monkeypatch.setattr(steer.deltas.stored.yaml, "safe_dump", lambda about, **_: json.dumps({**about, "made_of": []}))
    with pytest.raises(ValueError, match=r"delta\.yaml was not written as it was meant"):
        save(delta, tmp_path / "out", linked=True)
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def test_a_tied_tensor_is_the_one_it_is_tied_to(tmp_path):
    model = build("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    write_model(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(ValueError, match=r"lm_head.weight was not written .* its numbers are others"):
        prove_model(tmp_path, model)


def test_numbers_that_are_none_are_compared_by_their_bits(tmp_path):
    odd = torch.tensor([float("nan"), -0.0, float("inf")])
    save_file({"a": odd}, tmp_path / "model.safetensors")
    prove_written(tmp_path, {"a": Meant.of(odd.clone())})
    with pytest.raises(ValueError, match="a was not written as it was computed"):
        prove_written(tmp_path, {"a": Meant.of(odd.abs())})


def test_the_parts_of_a_parameter_are_named_as_they_are_on_disk(tmp_path):
    model = build("qwen3_moe")
    write_model(model, tmp_path)
    names = {name for key, tensor in model.state_dict().items() for name in on_disk(model, key, tensor)}
    assert names == set(load_file(tmp_path / "model.safetensors"))
