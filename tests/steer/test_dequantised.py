"""A checkpoint that transformers unpacks while loading is exported plain; codes that are still codes are refused."""

import json

import pytest
import torch
from families import BASE, SPARSE, build, build_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from probes.model.loading import load
from probes.model.quantised import is_quantised
from probes.model.sites import Site
from steer.checkpoints.writing import write_model
from steer.deltas.dial import dialled
from steer.deltas.recipe import recipe_delta
from steer.folding._export import export
from steer.folding._fold import folded
from steer.folding.draft import NotFoldable
from steer.folding.export_lora import export_adapter
from steer.interventions.activation import Ablate
from steer.recipes.recipe import Recipe

IDS = torch.tensor([[1, 7, 8, 5, 3, 9, 10, 4, 11]])
WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
MXFP4 = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}


def cut(model):
    return Recipe.of(model, [Ablate(Site(1, "result", 2), torch.ones(model.config.hidden_size))])


def plain_folder(folder, family, own):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **BASE | own)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def rewrite(folder, tensors, method):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(words | {"quantization_config": method}))


def in_fp8(folder, family, own):
    """Blocks of 128 by 128, as DeepSeek-V3 and Qwen3-FP8 are published."""
    packed = {}
    for name, tensor in plain_folder(folder, family, own).items():
        if "proj" in name and tensor.dim() == 2:
            packed[name] = (tensor.float() * 100).to(torch.float8_e4m3fn)
            packed[f"{name}_scale_inv"] = torch.full([-(-size // 128) for size in tensor.shape], 0.01)
        else:
            packed[name] = tensor
    rewrite(folder, packed, {"quant_method": "fp8", "weight_block_size": [128, 128]})


def in_mxfp4(folder, family, own):
    """Experts in blocks of 32 numbers of 4 bits with one scale, as gpt-oss is published."""
    packed, random = {}, torch.Generator().manual_seed(1)
    for name, tensor in plain_folder(folder, family, own).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, d_in, d_out = tensor.shape
            shape = (experts, d_out, d_in // 32, 16)
            packed[f"{name}_blocks"] = torch.randint(256, shape, generator=random, dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.full(shape[:3], 124, dtype=torch.uint8)
        else:
            packed[name] = tensor
    rewrite(folder, packed, {"quant_method": "mxfp4"})


KINDS = {
    "fp8": (in_fp8, "qwen3", WIDE),
    "fp8 of experts": (in_fp8, "qwen3_moe", WIDE | SPARSE | {"moe_intermediate_size": 128}),
    "mxfp4": (in_mxfp4, "gpt_oss", MXFP4),
}


@pytest.fixture(params=KINDS)
def unpacked(request, tmp_path):
    """The folder of codes, the model that transformers makes of it, and the names of its plain checkpoint."""
    make, family, own = KINDS[request.param]
    names = set(plain_folder(tmp_path / "plain", family, own))
    make(tmp_path / "codes", family, own)
    return tmp_path / "codes", load(str(tmp_path / "codes")), names


@torch.no_grad()
def test_an_export_of_unpacked_weights_is_plain_and_reads_back_as_what_was_folded(unpacked, tmp_path):
    codes, model, names = unpacked
    assert not is_quantised(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    changes = export(model, cut(model), tmp_path / "out")
    assert [tensor.name for tensor in changes.tensors] == ["model.layers.1.self_attn.o_proj.weight"]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert set(held) == names
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    twin, again = folded(model, cut(model)), load(str(tmp_path / "out"))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in twin.state_dict().items())
    assert torch.equal(again(IDS).logits, twin(IDS).logits)
    assert torch.equal(load(str(codes))(IDS).logits, model(IDS).logits)  # the model was left as it was


@torch.no_grad()
def test_a_delta_of_unpacked_weights_has_the_names_of_the_plain_checkpoint(unpacked):
    _, model, _ = unpacked
    delta = recipe_delta(model, cut(model))
    assert delta.names == ("model.layers.1.self_attn.o_proj.weight",)
    with dialled(model, delta, 1.0):
        turned = model(IDS).logits
    assert torch.equal(turned, folded(model, cut(model))(IDS).logits)


def test_an_adapter_of_unpacked_weights_is_written(unpacked, tmp_path):
    _, model, _ = unpacked
    assert len(export_adapter(model, cut(model), tmp_path / "adapter").tensors) == 1


class Coded(nn.Module):
    """A projection as GPTQ and AWQ hold it: codes in buffers, and no weight."""

    def __init__(self, plain):
        super().__init__()
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, None
        self.register_buffer("qweight", torch.zeros(4, plain.out_features, dtype=torch.int32))
        self.plain = [plain.weight]

    def forward(self, x):
        return x @ self.plain[0].T


def with_codes(model):
    model.model.layers[1].self_attn.o_proj = Coded(model.model.layers[1].self_attn.o_proj)


def with_floats_of_8_bits(model):
    weight = model.model.layers[1].self_attn.o_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("pack", [with_codes, with_floats_of_8_bits], ids=lambda pack: pack.__name__)
def test_codes_in_memory_are_refused_by_name_at_every_door(pack, tmp_path):
    model = build("llama")
    recipe = cut(model)
    pack(model)
    assert is_quantised(model)
    recipe = Recipe(recipe.steps, {**recipe.model, "fingerprint": None}, recipe.method)
    for door in (
        lambda: folded(model, recipe),
        lambda: export(model, recipe, tmp_path / "out"),
        lambda: export_adapter(model, recipe, tmp_path / "out"),
    ):
        with pytest.raises(NotFoldable, match=r"The weights of '.*' are quantised"):
            door()
    with pytest.raises(ValueError, match=r"The weights of '.*' are quantised"):
        write_model(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
