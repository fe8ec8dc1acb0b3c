"""Weights that are on disk are read where they are; what would edit them says that it cannot."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from probes import Site, attached, direction_between, generate, head_writes, load
from probes.model import fingerprint
from probes.model.architectures import head_matrices
from probes.model.loading import ORGANISM
from probes.thinking import thinking
from steer import Ablate, Add, Recipe, applied, export, folded
from steer.folding import export_adapter

IDS = torch.tensor([[1, 6, 17, 7, 27, 5, 3]])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The organism in memory, and with its last two layers on disk."""
    parts = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb")}
    layers = {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    bare = AutoModelForCausalLM.from_pretrained(
        ORGANISM, device_map=parts | layers, offload_folder=tmp_path_factory.mktemp("offloaded")
    )
    assert any(parameter.is_meta for parameter in bare.parameters())
    return load("organism"), load(bare, tokenizer=AutoTokenizer.from_pretrained(ORGANISM))


def same(pair, read):
    plain, offloaded = (read(model) for model in pair)
    torch.testing.assert_close(offloaded, plain)


def test_offloaded_weights_are_read(pair):
    assert fingerprint(pair[0]) == fingerprint(pair[1])
    same(pair, lambda m: head_matrices(m, 3).float())
    texts = (["a 3 b +4 quick"], ["a 3 b +4"])
    same(pair, lambda m: direction_between(m, *texts, Site(2, "resid_mid")).vector)
    (done,) = generate(pair[0], ["a 3 b +4 c *7"])
    same(pair, lambda m: head_writes(m, [thinking(done)], {2: torch.ones(96), 3: torch.ones(96)})[2:])


@torch.no_grad()
@pytest.mark.parametrize("site", [Site(3, "result", 1), Site(2, "z", 3), Site(3, "resid_mid")])
def test_offloaded_models_are_steered(pair, site):
    def zeroed(model):
        with attached(model, site, torch.zeros_like):
            return model(IDS).logits

    def ablated(model):
        with applied(model, Recipe.of(model, [Ablate(Site(3, "result", 1), torch.ones(96)),
                                              Add(Site(2, "resid_post"), torch.ones(96), 0.5)])):  # fmt: skip
            return model(IDS).logits

    same(pair, zeroed)
    same(pair, ablated)


def test_offloaded_models_are_not_edited(pair, tmp_path):
    model = pair[1]
    recipe = Recipe.of(model, [Ablate(Site(3, "result", 1), torch.ones(96))])
    for write in (folded, lambda m, r: export(m, r, tmp_path / "a"), lambda m, r: export_adapter(m, r, tmp_path / "b")):
        with pytest.raises(ValueError, match="model.layers.2.* is offloaded, and not in memory: it can be read and"):
            write(model, recipe)
    assert list(tmp_path.iterdir()) == []
