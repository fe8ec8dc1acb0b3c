"""Weights alone are the model, or what stands around them is merged or refused by name."""

import copy

import pytest
import torch
from families import build
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils import parametrizations

from probes.activations.heads import head_writes
from probes.model.architectures import o_proj_of
from probes.model.hooks import attached, captured
from probes.model.loading import check_source, load, tokenizer_of
from probes.model.sites import Site
from probes.thinking.spans import Span
from steer.folding._export import export
from steer.folding._fold import check_folds, fold, fold_error, folded
from steer.folding.export_lora import export_adapter
from steer.interventions.activation import Ablate
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied

HEAD = Site(1, "result", 2)


def cut(model):
    return Recipe.of(model, [Ablate(HEAD, torch.ones(model.config.hidden_size))])


def adapted(model, targets, **more):
    """A PeftModel whose adapter changes what the model computes."""
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False, **more)
    return get_peft_model(copy.deepcopy(model), config).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_folder_of_an_adapter_is_its_base_with_the_adapter_merged(family, tokens, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path / "base")
    tokenizer_of(model).save_pretrained(tmp_path / "base")
    targets = ["c_proj", "c_attn"] if family == "gpt2" else ["o_proj", "q_proj", "down_proj"]
    base = load(str(tmp_path / "base"))
    with_adapter = adapted(base, targets, fan_in_fan_out=family == "gpt2")
    with_adapter.save_pretrained(tmp_path / "adapter")
    merged = load(str(tmp_path / "adapter"))
    torch.testing.assert_close(merged(tokens).logits, with_adapter(tokens).logits, atol=1e-5, rtol=0)
    assert (merged(tokens).logits - base(tokens).logits).abs().max() > 0.1
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert tokenizer_of(merged).get_vocab() == tokenizer_of(base).get_vocab()

    recipe = cut(merged)
    assert fold_error(merged, folded(merged, recipe), recipe, tokens, torch.ones_like(tokens)) < 1e-5
    changes = export(merged, recipe, tmp_path / "out")
    assert len(changes.tensors) == 1
    with applied(merged, recipe):
        steered = merged(tokens).logits
    torch.testing.assert_close(load(str(tmp_path / "out"))(tokens).logits, steered, atol=1e-5, rtol=0)


def test_an_adapter_that_its_base_cannot_hold_is_refused_at_load(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    tokenizer_of(model).save_pretrained(tmp_path / "base")
    adapted(load(str(tmp_path / "base")), ["o_proj"], lora_bias=True).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"The adapter at model.layers.0.self_attn.o_proj cannot be merged into its"):
        load(str(tmp_path / "adapter"))


def test_a_peft_model_is_refused_and_told_what_to_give():
    with pytest.raises(ValueError, match=r"A PeftModel.* is no model .*: merge its adapter first, model.merge_and"):
        check_source(adapted(build("llama"), ["o_proj"]))


def with_lora(model, target="o_proj"):
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=[target], init_lora_weights=False))


def with_parametrisation(model):
    for layer in range(3):
        parametrizations.orthogonal(o_proj_of(model, layer))


def with_another_forward(model):
    module = o_proj_of(model, 1)
    plain = module.forward
    module.forward = lambda x: 2 * plain(x)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_another_class(model):
    module = o_proj_of(model, 1)
    new = Doubled(module.in_features, module.out_features, bias=False)
    new.weight = module.weight
    model.model.layers[1].self_attn.o_proj = new


WRAPPED = {
    with_lora: r"wrapped by an adapter \(peft's Linear\)",
    with_parametrisation: r"parametrised \(weight\)",
    with_another_forward: r"given another forward",
    with_another_class: r"of a class that is not known",
}
DOORS = {
    "captured": lambda model, _: captured(model, [HEAD]).__enter__(),
    "attached": lambda model, _: attached(model, HEAD, lambda x: x).__enter__(),
    "scores": lambda model, _: head_writes(model, [Span((1, 7, 8, 9), 1, 4)], {1: torch.ones(32)}),
    "fold": lambda model, _: fold(model, cut(model)),
    "folded": lambda model, _: folded(model, cut(model)),
    "check": lambda model, _: check_folds(model, cut(model)),
    "export": lambda model, folder: export(model, cut(model), folder),
    "adapter": lambda model, folder: export_adapter(model, cut(model), folder),
}


@pytest.mark.parametrize("wrap", WRAPPED, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("door", DOORS)
def test_a_wrapped_projection_is_refused_by_name_at_every_door(wrap, door, tmp_path):
    model = build("llama")
    wrap(model)
    with pytest.raises(ValueError, match=rf"o_proj.* is {WRAPPED[wrap]}.* so that .* Merge it first"):
        DOORS[door](model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_what_is_wrapped_elsewhere_is_read_and_steered_and_not_folded(tokens):
    model = build("llama")
    with_lora(model, "q_proj")
    plain = model(tokens).logits
    with applied(model, cut(model)), captured(model, [HEAD]) as cache:
        assert not torch.allclose(model(tokens).logits, plain)
    assert cache[HEAD].shape == (*tokens.shape, 32)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj is wrapped by an adapter"):
        folded(model, cut(model))


@torch.no_grad()
def test_the_adapter_of_an_export_loads_as_the_exported_model_does(tokens, tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    tokenizer_of(model).save_pretrained(tmp_path / "base")
    base = load(str(tmp_path / "base"))
    export_adapter(base, cut(base), tmp_path / "adapter")
    ours, peft = load(str(tmp_path / "adapter")), PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(ours(tokens).logits, peft(tokens).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(tokens).logits, folded(base, cut(base))(tokens).logits, atol=1e-5, rtol=0)
