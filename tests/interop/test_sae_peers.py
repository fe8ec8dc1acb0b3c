"""Autoencoders that sparsify and dictionary_learning write do here what they do there (`make peers` installs both)."""

import json
import sys
import types

import pytest
import torch

from probes.saes import load_sae

X = 3 * torch.randn(6, 12, generator=torch.Generator().manual_seed(0)) + 1


def filled(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return module


@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True)])
def test_sparsify(tmp_path, transcode, skip):
    sparsify = pytest.importorskip("sparsify")
    config = sparsify.SparseCoderConfig(num_latents=40, k=5, transcode=transcode, skip_connection=skip)
    theirs = filled(sparsify.SparseCoder(12, config, device="cpu"))
    theirs.save_to_disk(tmp_path / "layers.3.mlp")
    mine = load_sae(tmp_path / "layers.3.mlp")
    with torch.no_grad():
        active, out = theirs.encode(X), theirs(X).sae_out
    latents = torch.zeros(6, 40).scatter(1, active.top_indices, active.top_acts)
    torch.testing.assert_close(mine.encode(X), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine(X), out, rtol=1e-5, atol=1e-4)
    assert (str(mine.site), str(mine.out_site)) == ("L3.mlp_in" if transcode else "L3.mlp_out", "L3.mlp_out")


@pytest.mark.parametrize("kind", ["AutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"])
def test_dictionary_learning(tmp_path, kind, monkeypatch):
    try:
        import nnsight  # noqa: F401
    except ImportError:  # it asks for one that clashes with ours, for its buffer alone
        stub = types.ModuleType("nnsight")
        setattr(stub, "LanguageModel", object)
        monkeypatch.setitem(sys.modules, "nnsight", stub)
    pytest.importorskip("dictionary_learning")
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, top_k

    made = next(getattr(module, kind) for module in (dictionary, top_k, batch_top_k) if hasattr(module, kind))
    theirs = filled(made(12, 40, 5) if "Top" in kind else made(12, 40))
    if hasattr(theirs, "threshold"):
        theirs.threshold.data.copy_(torch.rand(theirs.threshold.shape))
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": kind, "submodule_name": "resid_post_layer_4", "lm_name": "x", "k": 5}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    mine = load_sae(tmp_path, pickle=True)
    with torch.no_grad():
        torch.testing.assert_close(mine.encode(X), theirs.encode(X), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine(X), theirs(X), rtol=1e-5, atol=1e-4)
