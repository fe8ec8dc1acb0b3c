"""An autoencoder says what its library says, a wrong label is found out, and what is written is read back."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build
from safetensors.torch import save_file

from probes import Span, read_completions
from probes.model.loading import load
from probes.model.sites import Site
from probes.saes import Birth, SparseAutoencoder, check_sae, latent_direction, load_sae, save_sae
from probes.saes.loading import EMBEDDED
from probes.saes.reading import streamed
from probes.thinking import text_span
from steer import Add, Recipe, applied, folded

ROOT = Path(__file__).parents[2]

D, N, K = 12, 40, 5
LABEL = {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = 3 * numbers(7, 4, D, seed=9) + 1


def ours(activation="relu", **more):
    threshold = numbers(N, seed=5).abs() if activation == "jumprelu" else None
    k = K if activation == "topk" else 0
    parts = numbers(D, N, seed=1), numbers(N, seed=2), numbers(N, D, seed=3), numbers(D, seed=4)
    return SparseAutoencoder(Site(1, "resid_post"), *parts, activation, threshold, k, **more)


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("normalisation", ["none", "layer", "length"])
def test_some_latents_are_those_of_all(activation, normalisation):
    sae = ours(activation, normalisation=normalisation, scale=0.5, centred=True)
    f = sae.encode(X)
    assert 0 < int((f > 0).sum()) < f.numel()
    torch.testing.assert_close(sae.encode_at(X, [3, 0, 17]), f[..., [3, 0, 17]])


@pytest.mark.parametrize("normalisation", ["none", "layer", "length"])
def test_decoding_undoes_the_units(normalisation):
    """As many latents as numbers, one each way: what goes in comes out."""
    eye = torch.eye(D)
    sae = SparseAutoencoder(
        Site(1, "resid_post"), torch.cat([eye, -eye], 1), torch.zeros(2 * D), torch.cat([eye, -eye]), numbers(D),
        centred=True, normalisation=normalisation, scale=0.25,
    )  # fmt: skip
    torch.testing.assert_close(sae(X), X)
    step = sae.step(X)
    f = sae.encode(X)
    bumped = f.clone()
    bumped[..., 3] += 2
    torch.testing.assert_close(sae.decode(bumped, X) - sae.decode(f, X), (2 * step * sae.W_dec[3]).expand_as(X))


class TestAgainstSAELens:
    """Written by the library, read by us, and the other way round."""

    @staticmethod
    def saved(folder, name, **config):
        import sae_lens
        from sae_lens.saes.sae import SAEMetadata

        label = LABEL | (
            {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"} if "Trans" in name else {}
        )
        made = getattr(sae_lens, f"{name}Config")(d_in=D, d_sae=N, metadata=SAEMetadata(**label), **config)
        sae = getattr(sae_lens, name)(made)
        with torch.no_grad():
            for i, (_, parameter) in enumerate(sorted(sae.named_parameters())):
                parameter.copy_(numbers(*parameter.shape, seed=i))
            if "JumpReLU" in name:
                sae.threshold.abs_()
        sae.save_model(folder)
        return sae

    CASES = (
        ("StandardSAE", {}),
        ("StandardSAE", {"apply_b_dec_to_input": False}),
        ("StandardSAE", {"normalize_activations": "layer_norm"}),
        ("StandardSAE", {"normalize_activations": "constant_norm_rescale"}),
        ("TopKSAE", {"k": K}),
        ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("JumpReLUSAE", {}),
        ("Transcoder", {"d_out": 9, "apply_b_dec_to_input": False}),
        ("SkipTranscoder", {"d_out": 9, "apply_b_dec_to_input": False}),
        ("JumpReLUTranscoder", {"d_out": 9, "apply_b_dec_to_input": False}),
    )

    @pytest.mark.parametrize(("name", "config"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
    def test_what_it_writes_is_read_as_it_computes(self, tmp_path, name, config):
        theirs = self.saved(tmp_path / "sae", name, **config)
        mine = load_sae(tmp_path / "sae")
        with torch.no_grad():
            f = theirs.encode(X)
            torch.testing.assert_close(mine.encode(X), f, rtol=1e-5, atol=1e-5)
            want = theirs.forward(X) if hasattr(theirs, "W_skip") else theirs.decode(f)
        torch.testing.assert_close(mine(X), want, rtol=1e-5, atol=1e-4)
        if "Transcoder" in name:
            assert (mine.site, mine.out_site) == (Site(1, "mlp_in"), Site(1, "mlp_out"))
        else:
            assert mine.site == mine.out_site == Site(1, "resid_post")
        assert mine.birth.model == "tiny"

    @pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
    def test_what_we_write_it_reads(self, tmp_path, activation):
        from sae_lens import SAE

        mine = ours(activation, centred=True)
        save_sae(mine, tmp_path / "sae", model="tiny")
        theirs = SAE.load_from_disk(str(tmp_path / "sae"), device="cpu")
        with torch.no_grad():
            torch.testing.assert_close(theirs.encode(X), mine.encode(X), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(theirs(X), mine(X), rtol=1e-5, atol=1e-5)
        again = load_sae(tmp_path / "sae")
        assert torch.equal(again.W_enc, mine.W_enc)
        assert again.site == mine.site

    def test_one_of_before_version_6(self, tmp_path):
        sae = ours()
        config = {"d_in": D, "d_sae": N, "hook_point": "blocks.3.hook_resid_pre", "activation_fn_str": "topk",
                  "activation_fn_kwargs": {"k": 4}, "model_name": "old"}  # fmt: skip
        (tmp_path / "cfg.json").write_text(json.dumps(config))
        save_file(
            {n: getattr(sae, n) for n in ("W_enc", "b_enc", "W_dec", "b_dec")}, tmp_path / "sae_weights.safetensors"
        )
        old = load_sae(tmp_path)
        assert (old.site, old.k, old.activation, old.centred) == (Site(3, "resid_pre"), 4, "topk", True)


def formula(sae, x, *, subtract, activation, k=K, threshold=None, scale=1.0):
    """Written out, in float64."""
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, n).double() for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    pre = (scale * x.double() - (b_dec if subtract else 0)) @ W_enc + b_enc
    f = pre.clamp(min=0)
    if activation == "topk":
        f = f * (f >= f.sort(-1).values[..., -k : -k + 1 or None][..., :1])
    if activation == "jumprelu":
        f = f * (pre > threshold.double())
    return f, (f @ W_dec + b_dec) / scale


def agree(mine, want):
    f, out = want
    torch.testing.assert_close(mine.encode(X).double(), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine(X).double(), out, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("hookpoint", ["layers.3", "layers.3.mlp"])
def test_sparsify(tmp_path, hookpoint):
    """`W_dec` is not to be turned, and `layers.3.mlp` is no residual stream."""
    sae, folder = ours(), tmp_path / hookpoint
    folder.mkdir()
    config = {"activation": "topk", "num_latents": N, "k": K, "d_in": D, "normalize_decoder": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model": "org/base"}))
    tensors = {
        "encoder.weight": sae.W_enc.T.contiguous(),
        "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    save_file(tensors, folder / "sae.safetensors")
    mine = load_sae(folder)
    assert (str(mine.site), mine.birth.model) == ("L3.mlp_out" if "mlp" in hookpoint else "L3.resid_post", "org/base")
    agree(mine, formula(sae, X, subtract=True, activation="topk"))


def test_a_transcoder_of_sparsify_reads_what_goes_into_the_mlp_and_skips(tmp_path):
    sae, folder, skip = ours(), tmp_path / "layers.2.mlp", numbers(D, D, seed=8)
    folder.mkdir()
    config = {"num_latents": N, "k": K, "d_in": D, "transcode": True, "skip_connection": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    tensors = {"encoder.weight": sae.W_enc.T.contiguous(), "encoder.bias": sae.b_enc, "W_dec": sae.W_dec,
               "b_dec": sae.b_dec, "W_skip": skip}  # fmt: skip
    save_file(tensors, folder / "sae.safetensors")
    mine = load_sae(folder)
    assert (str(mine.site), str(mine.out_site)) == ("L2.mlp_in", "L2.mlp_out")
    f, out = formula(sae, X, subtract=False, activation="topk")
    agree(mine, (f, out + X.double() @ skip.double().T))


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder"])
def test_dictionary_learning(tmp_path, kind):
    sae, threshold = ours(), torch.tensor(0.7)
    linear = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec.T}
    tensors = {
        "AutoEncoder": {**linear, "bias": sae.b_dec},
        "AutoEncoderTopK": {**linear, "b_dec": sae.b_dec, "k": torch.tensor(K), "threshold": threshold},
        "BatchTopKSAE": {**linear, "b_dec": sae.b_dec, "k": torch.tensor(K), "threshold": threshold},
        "JumpReluAutoEncoder": {n: getattr(sae, n) for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
        | {"threshold": threshold.expand(N).clone()},
    }[kind]
    torch.save(tensors, tmp_path / "ae.pt")
    trainer = {"dict_class": kind, "layer": 4, "lm_name": "org/base", "submodule_name": "resid_post_layer_4", "k": K}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    with pytest.raises(PermissionError, match="pickle=True"):
        load_sae(tmp_path)
    mine = load_sae(tmp_path, pickle=True)
    activation = {"AutoEncoder": "relu", "AutoEncoderTopK": "topk"}.get(kind, "jumprelu")
    assert (str(mine.site), mine.activation) == ("L4.resid_post", activation)
    agree(mine, formula(sae, X, subtract=kind != "JumpReluAutoEncoder", activation=activation, threshold=threshold))


@pytest.mark.parametrize("by_norm", [False, True])
def test_llama_scope_has_a_log_threshold_and_a_scale(tmp_path, by_norm):
    sae, threshold = ours(), numbers(N, seed=6).abs() + 0.1
    config = {"act_fn": "jumprelu", "d_model": D, "hook_point_in": "blocks.15.hook_resid_post",
              "dataset_average_activation_norm": {"in": 2.0}, "sparsity_include_decoder_norm": by_norm}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"encoder.weight": sae.W_enc.T.contiguous(), "encoder.bias": sae.b_enc, "decoder.bias": sae.b_dec,
               "decoder.weight": sae.W_dec.T.contiguous(), "log_jumprelu_threshold": threshold.log()}  # fmt: skip
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    mine = load_sae(tmp_path)
    scale = D**0.5 / 2.0
    bar = threshold / sae.W_dec.norm(dim=1) if by_norm else threshold
    assert str(mine.site) == "L15.resid_post"
    agree(mine, formula(sae, X, subtract=False, activation="jumprelu", threshold=bar, scale=scale))


@pytest.mark.parametrize(("path", "site"), [
    ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "L20.resid_post"),
    ("gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_71", "L3.mlp_out"),
    ("gemma-scope-2-1b-it/attn_out/layer_7_width_16k_l0_medium", "L7.z"),
])  # fmt: skip
def test_gemma_scope(tmp_path, path, site):
    sae, folder = ours("jumprelu"), tmp_path / path
    folder.mkdir(parents=True)
    named = {n: getattr(sae, n).numpy() for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    np.savez(folder / "params.npz", **named)
    mine = load_sae(folder)
    assert str(mine.site) == site
    agree(mine, formula(sae, X, subtract=False, activation="jumprelu", threshold=sae.threshold))


def test_a_cross_layer_transcoder_is_refused_not_summed(tmp_path):
    sae = ours("jumprelu")
    folder = tmp_path / "clt" / "layer_3_transcoder"
    folder.mkdir(parents=True)
    tensors = {"w_enc": sae.W_enc, "b_enc": sae.b_enc, "w_dec": sae.W_dec[:, None].repeat(1, 3, 1), "b_dec": sae.b_dec,
               "threshold": sae.threshold}  # fmt: skip
    save_file(tensors, folder / "params.safetensors")
    with pytest.raises(ValueError, match="cross-layer transcoder"):
        load_sae(folder)


def test_qwen_scope_and_linear_files(tmp_path):
    sae, folder = ours(), tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
    folder.mkdir()
    path = folder / "layer3.sae.pt"
    torch.save({"W_enc": sae.W_enc.T, "W_dec": sae.W_dec.T, "b_enc": sae.b_enc, "b_dec": sae.b_dec}, path)
    mine = load_sae(path, pickle=True)
    assert (str(mine.site), mine.k, mine.birth.model) == ("L3.resid_post", 5, "Qwen3-1.7B-Base")
    agree(mine, formula(sae, X, subtract=False, activation="topk"))
    path = tmp_path / "DeepSeek-R1-SAE-l37.pt"
    torch.save({"encoder_linear.weight": sae.W_enc.T, "encoder_linear.bias": sae.b_enc,
                "decoder_linear.weight": sae.W_dec.T, "decoder_linear.bias": sae.b_dec}, path)  # fmt: skip
    mine = load_sae(path, pickle=True)
    assert (str(mine.site), mine.activation) == ("L37.resid_post", "relu")
    agree(mine, formula(sae, X, subtract=False, activation="relu"))


class TestRefusals:
    def test_what_is_no_autoencoder(self, tmp_path):
        (tmp_path / "notes.txt").write_text("no")
        with pytest.raises(ValueError, match="holds notes.txt, which is no autoencoder"):
            load_sae(tmp_path)
        with pytest.raises(FileNotFoundError, match="no embedded autoencoder"):
            load_sae("./nothing")

    def test_a_setting_that_is_not_known(self, tmp_path):
        save_sae(ours(), tmp_path / "sae")
        config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
        for key, value in (("architecture", "gated"), ("normalize_activations", "covariance_whitening")):
            (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config | {key: value}))
            with pytest.raises(ValueError, match=f"{key} '{value}'. Known: "):
                load_sae(tmp_path / "sae")

    def test_a_tensor_that_would_be_overlooked(self, tmp_path):
        save_sae(ours(), tmp_path / "sae")
        named = {n: getattr(ours(), n) for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
        save_file(named | {"gate": torch.ones(N)}, tmp_path / "sae" / "sae_weights.safetensors")
        with pytest.raises(ValueError, match="holds gate, of which it is not known what it does"):
            load_sae(tmp_path / "sae")

    def test_a_matrix_the_other_way_round(self):
        with pytest.raises(ValueError, match="stored the other way round"):
            SparseAutoencoder(Site(0, "resid_post"), numbers(D, N), numbers(N), numbers(D, N), numbers(D))

    def test_numbers_that_are_none(self):
        with pytest.raises(ValueError, match="W_enc holds NaN"):
            SparseAutoencoder(Site(0, "resid_post"), numbers(D, N) / 0, numbers(N), numbers(N, D), numbers(D))

    def test_a_pickle_that_would_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (print, ("run",))

        torch.save({"W_enc": Evil()}, tmp_path / "layer1.sae.pt")
        with pytest.raises(ValueError, match="layer1.sae.pt"):
            load_sae(tmp_path / "layer1.sae.pt", pickle=True, k=3)


TEXTS = tuple(f"a {i % 10} b +{i % 7} c *{i % 5} d +{i % 3}" for i in range(60))


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def fitted(organism):
    spans = [text_span(organism, text) for text in TEXTS]
    x = torch.cat([r.x[r.used] for r in streamed(organism, spans, Site(2, "resid_post"))])
    mean = x.mean(0)
    rows = torch.linalg.svd(x - mean, full_matrices=False).Vh[:24]
    both = torch.cat([rows, -rows])
    return SparseAutoencoder(Site(2, "resid_post"), both.T.clone(), torch.zeros(48), both, mean, centred=True)


class TestLabels:
    """A dictionary that explains L2.resid_post of the organism: its principal directions, each way."""

    def test_a_right_label_passes(self, organism, fitted):
        fit = check_sae(organism, fitted, TEXTS)
        assert fit.declared.variance > 0.9
        assert fit.best == fit.declared

    def test_a_neighbour_that_wins_is_named(self, organism, fitted):
        for site in ("L1.resid_post", "L2.resid_mid", "L3.resid_post"):
            with pytest.raises(
                ValueError, match="the label is wrong. Load it with site='L2.resid_post'|explains nothing"
            ):
                check_sae(organism, replace(fitted, site=Site.parse(site)), TEXTS)
        assert check_sae(organism, replace(fitted, site=Site(1, "resid_post")), TEXTS, force=True).best.site == Site(
            2, "resid_post"
        )

    def test_the_output_of_an_mlp_that_is_labelled_as_the_stream(self, organism, fitted):
        with pytest.raises(ValueError, match="at L2.mlp_out, where its label puts it, and 0.99 at L2.resid_post"):
            check_sae(organism, replace(fitted, site=Site(2, "mlp_out")), TEXTS)
        turned = replace(fitted, W_dec=-fitted.W_dec)
        with pytest.raises(ValueError, match="explains nothing of the activations there"):
            check_sae(organism, turned, TEXTS)

    def test_a_decoder_that_was_turned(self, organism):
        square = SparseAutoencoder(
            Site(2, "resid_post"), torch.eye(96), torch.zeros(96), numbers(96, 96), torch.zeros(96)
        )
        with pytest.raises(ValueError, match="stored the other way round"):
            check_sae(organism, square, TEXTS)

    def test_another_model(self, organism, fitted):
        wrong = replace(fitted, birth=Birth("Llama-Scope", "x", "meta-llama/Llama-3.1-8B"))
        with pytest.raises(
            ValueError, match="says that it was trained on meta-llama/Llama-3.1-8B, and this model is organism"
        ):
            check_sae(organism, wrong, TEXTS)
        check_sae(organism, wrong, TEXTS, force=True)


def test_a_decoder_row_is_a_direction_in_the_model_s_units(organism, fitted):
    spans = [text_span(organism, text) for text in TEXTS[:4]]
    scaled = replace(fitted, scale=0.5)
    direction = latent_direction(organism, scaled, 3, spans)
    torch.testing.assert_close(direction.vector, 2 * fitted.W_dec[3])
    assert direction.site == Site(2, "resid_post")
    assert direction.stream_norm > 1
    x = torch.ones(96)
    bumped = scaled.encode(x)
    moved = bumped.clone()
    moved[3] += 1
    torch.testing.assert_close(scaled.decode(moved) - scaled.decode(bumped), direction.vector, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="Latent 48 is not one of the 48"):
        latent_direction(organism, fitted, 48, spans)


def test_a_row_that_is_added_folds_where_a_shift_does():
    model = build("gpt2")
    sae = SparseAutoencoder.at_random("L1.mlp_out", d_in=32, d_sae=40, k=4)
    direction = latent_direction(model, sae, 7, [Span((1, 7, 8, 5), 0, 4)])
    recipe = Recipe.of(model, [Add.of(direction, 0.5)])
    ids = torch.tensor([[1, 7, 8, 5, 9]])
    with torch.no_grad(), applied(model, recipe):
        steered = model(ids).logits
    torch.testing.assert_close(folded(model, recipe)(ids).logits, steered, rtol=1e-4, atol=1e-4)


def test_the_one_of_the_reasoner_is_small_and_says_its_licence_and_explains():
    sae = load_sae("reasoner-L15")
    assert sum(path.stat().st_size for path in (EMBEDDED / "reasoner-L15").iterdir()) < 8_000_000
    assert "Apache-2.0" in sae.birth.licence
    assert "SmolLM2-135M-Instruct" in sae.birth.licence
    model = load("reasoner")
    completions = read_completions(ROOT / "notebooks" / "stories" / "plain.jsonl")[:3]
    fit = check_sae(model, sae, [Span(tuple(c.all_ids), 0, len(c.all_ids)) for c in completions])
    assert fit.declared.variance > 0.9
