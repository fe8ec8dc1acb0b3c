"""A recipe works at run time on quantised weights, and is not written into them."""

import copy

import bitsandbytes
import pytest
import torch
from families import build
from torch import nn

from probes.model.architectures import head_matrices, o_proj_of
from probes.model.hooks import attached, captured
from probes.model.loading import load
from probes.model.quantised import is_quantised
from probes.model.sites import Site
from steer.folding._fold import fold, folded
from steer.folding.draft import NotFoldable
from steer.interventions.activation import Ablate, Add
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied

IDS = torch.tensor([[1, 7, 8, 5, 3, 9, 10, 4, 11]])


def in_four_bits(module):
    new = bitsandbytes.nn.Linear4bit(
        module.in_features, module.out_features, module.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
    )
    new.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
    new.bias = module.bias
    return new.to("cpu")


@pytest.fixture(params=["llama", "llama+bias", "qwen3", "gemma2"])
def pair(request):
    """A model, and the same with every Linear of its blocks in four bits."""
    plain = build(request.param)
    packed = copy.deepcopy(plain)
    for name, module in list(packed.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, own = name.rpartition(".")
            setattr(packed.get_submodule(parent), own, in_four_bits(module))
    return plain, packed


@torch.no_grad()
def test_a_recipe_of_the_plain_model_steers_the_quantised_one_as_hooks_by_hand_do(pair):
    plain, packed = pair
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    site, head = Site(1, "resid_post"), Site(0, "result", 2)
    assert is_quantised(packed)
    assert not is_quantised(plain)

    module, d_in = o_proj_of(packed, 0), o_proj_of(packed, 0).in_features
    weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    unit, columns = vector / vector.norm(), slice(2 * d_in // 4, 3 * d_in // 4)
    with captured(packed, [Site(0, "z")]) as cache:
        packed(IDS)
    write = cache[Site(0, "z")][..., columns] @ weight[:, columns].T
    torch.testing.assert_close(head_matrices(packed, 0)[:, 2], weight[:, columns], atol=1e-5, rtol=1e-4)

    handle = module.register_forward_hook(lambda _m, _a, out: out - (write @ unit)[..., None] * unit)
    with attached(packed, site, lambda x: x + 0.5 * vector):
        by_hand = packed(IDS).logits
    handle.remove()
    with applied(packed, Recipe.of(plain, [Add(site, vector, 0.5), Ablate(head, vector)])):
        ours = packed(IDS).logits
    torch.testing.assert_close(ours, by_hand, atol=1e-4, rtol=1e-4)


def test_folding_into_packed_numbers_is_refused_by_name(pair):
    _, packed = pair
    before = copy.deepcopy(packed.state_dict())
    for write in (fold, folded):
        with pytest.raises(
            NotFoldable, match="The weights of 'LlamaForCausalLM|The weights of '.*' are quantised, and"
        ):
            write(packed, Recipe.of(packed, [Ablate(Site(0, "attn_out"), torch.ones(32))]))
    assert all(torch.equal(before[name], value) for name, value in packed.state_dict().items())


@torch.no_grad()
def test_load_packs_the_matrices_as_they_are_read():
    packed = load("smollm2", quantize="4bit")
    assert type(o_proj_of(packed, 0)) is bitsandbytes.nn.Linear4bit
    assert is_quantised(packed)
    site, before = Site(1, "resid_post"), Site(2, "resid_pre")
    vector = torch.randn(576, generator=torch.Generator().manual_seed(1))
    with captured(packed, [before]) as plain:
        packed(IDS)
    with applied(packed, Recipe.of(packed, [Add(site, vector, 5.0)])) as log, captured(packed, [before]) as steered:
        packed(IDS)
    torch.testing.assert_close(steered[before].float(), plain[before].float() + 5 * vector, atol=0.1, rtol=0.02)
    assert log.tokens == IDS.numel()
    with pytest.raises(NotFoldable, match="The weights of 'smollm2' are quantised"):
        folded(packed, Recipe.of(packed, [Ablate(Site(0, "result", 2), vector)]))


def test_where_and_how_to_load_is_asked_for_in_words():
    assert next(load("organism", device="cpu").parameters()).device == torch.device("cpu")
    with pytest.raises(ValueError, match="device puts the whole model on one device, and device_map shares it out"):
        load("organism", device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="quantize is '3bit'. Known: 4bit, 8bit."):
        load("organism", quantize="3bit")
    with pytest.raises(ValueError, match="A model that is built is not quantised any more: give load its hub id or"):
        load(build("llama"), quantize="4bit")
