"""The published suites: Llama-Scope-R1, Gemma Scope, Qwen-Scope, and single files with a linear layer each way.

As their files are laid out; each was checked against the layout's description, none against a download.
"""

import re
from pathlib import Path

import torch

from probes.fields import keys_of
from probes.model.sites import Site
from probes.saes.formats.parts import Tensors, known, pickled, site_of, tensors_of
from probes.saes.sae import Birth, SparseAutoencoder
from probes.texts import read_json

LLAMA, GEMMA = ("config.json", "sae_weights.safetensors"), ("params.npz", "params.safetensors")
_QWEN = re.compile(r"SAE-Res-(?P<model>.+)-W(?P<width>\d+)K-L0_(?P<k>\d+)")
_GEMMA_SITES = {
    "resid_post": "resid_post", "attn_out": "z", "mlp_out": "mlp_out",
    "-pt-res": "resid_post", "-it-res": "resid_post", "-mlp": "mlp_out", "-att": "z",
}  # fmt: skip


def read_llama_scope(folder: Path, *, site: Site | None, dtype: torch.dtype) -> SparseAutoencoder:
    """`log_jumprelu_threshold` is a logarithm; activations are scaled to a mean norm of the root of d_model."""
    where, config = str(folder / LLAMA[0]), read_json(folder / LLAMA[0], "config of an autoencoder")
    config = keys_of(config, where)
    known(config, "act_fn", {"jumprelu": 0}, where, default="jumprelu")
    tensors = Tensors(tensors_of(folder / LLAMA[1]), str(folder / LLAMA[1]), dtype)
    W_enc, W_dec = tensors.take("encoder.weight").T, tensors.take("decoder.weight").T
    b_enc, b_dec = tensors.take("encoder.bias"), tensors.take("decoder.bias")
    threshold = tensors.take("log_jumprelu_threshold").exp().expand(W_enc.shape[1]).clone()
    held = tensors.maybe("norm_scaling_factor", "dataset_average_activation_norm.in")
    tensors.done("dataset_average_activation_norm.out")
    if config.get("sparsity_include_decoder_norm"):
        threshold = threshold / W_dec.norm(dim=1)  # it is compared with the latent times its row's norm
    factor = config.get("norm_scaling_factor")
    if factor is None:
        norm = keys_of(config.get("dataset_average_activation_norm") or {}, where).get("in")
        factor = None if norm is None else W_enc.shape[0] ** 0.5 / float(norm)
    if factor is None and held is not None:
        factor = float(held)
    if factor is None:
        raise ValueError(
            f"{where} says neither norm_scaling_factor nor dataset_average_activation_norm, and without one its units "
            "are not known."
        )
    return SparseAutoencoder(
        site or site_of(str(config.get("hook_point_in")), where),
        W_enc, b_enc, W_dec, b_dec, "jumprelu", threshold,
        centred=bool(config.get("apply_decoder_bias_to_pre_encoder")),
        scale=float(factor),
        birth=Birth(
            "Llama-Scope", str(folder), str(config.get("model_name") or ""),
            note="other loaders call its base model Llama-3.1-8B; the R1 ones are of its R1 distillation",
        ),
    )  # fmt: skip


def read_gemma_scope(folder: Path, *, site: Site | None, dtype: torch.dtype) -> SparseAutoencoder:
    """Its site is told by the folder's path. Raises ValueError for a cross-layer transcoder, whose decoder has a row
    for each layer that it writes to: summed, they would be none of them."""
    file = next(folder / name for name in GEMMA if (folder / name).is_file())
    tensors = Tensors(tensors_of(file), str(file), dtype)
    W_enc, W_dec = tensors.take("W_enc", "w_enc"), tensors.take("W_dec", "w_dec")
    b_enc, b_dec, threshold = tensors.take("b_enc"), tensors.take("b_dec"), tensors.take("threshold")
    W_skip, factor = tensors.maybe("affine_skip_connection"), tensors.maybe("scaling_factor")
    tensors.done()
    if W_dec.ndim != 2:
        raise ValueError(
            f"{file} has a decoder of shape {list(W_dec.shape)}: a cross-layer transcoder, which writes to several "
            "layers, each by rows of its own. It is not read here."
        )
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise ValueError(f"{file} has a scaling_factor that is not 1, and it is not known of what.")
    path = str(folder.resolve())
    transcodes = "transcoder" in path
    layer = re.search(r"layer_(\d+)", path)
    name = next((name for part, name in _GEMMA_SITES.items() if part in path), None)
    if site is None and (layer is None or not (transcodes or name)):
        raise ValueError(f"{folder} does not tell its site: its path names no layer, or no known part. Give site=...")
    at = 0 if layer is None else int(layer[1])
    reads = site or Site.parse(f"L{at}.{'mlp_in' if transcodes else name}")
    return SparseAutoencoder(
        reads, W_enc, b_enc, W_dec, b_dec, "jumprelu", threshold,
        output=Site(reads.layer, "mlp_out") if transcodes else None,
        W_skip=W_skip,
        birth=Birth("Gemma Scope", str(folder)),
    )  # fmt: skip


def read_qwen_scope(
    path: Path, *, site: Site | None, dtype: torch.dtype, pickle: bool, k: int | None
) -> SparseAutoencoder:
    """`layer3.sae.pt`: both matrices stored the other way round, `k` and the model told by the repository's name."""
    named = _QWEN.search(str(path.resolve()))
    layer = re.search(r"layer(\d+)\.sae\.pt", path.name)
    k = k if k is not None else int(named["k"]) if named else None
    if k is None:
        raise ValueError(
            f"{path} does not tell how many latents are active: its path is no SAE-Res-...-L0_50. Give k=..."
        )
    tensors = Tensors(pickled(path, pickle), str(path), dtype)
    W_enc, W_dec, b_enc, b_dec = (tensors.take(name) for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    tensors.done()
    if site is None and layer is None:
        raise ValueError(f"{path} does not tell its layer. Give site=...")
    return SparseAutoencoder(
        site or Site(int(layer[1]) if layer else 0, "resid_post"), W_enc.T, b_enc, W_dec.T, b_dec, "topk", k=k,
        birth=Birth("Qwen-Scope", str(path), named["model"] if named else ""),
    )  # fmt: skip


def read_linear(path: Path, *, site: Site | None, dtype: torch.dtype, pickle: bool, k: int | None) -> SparseAutoencoder:
    """A `.pt` with an encoder and a decoder as linear layers (Goodfire, qresearch): relu, or the `k` largest."""
    tensors = Tensors(pickled(path, pickle), str(path), dtype)
    W_enc = tensors.take("encoder_linear.weight", "encoder.weight").T
    b_enc = tensors.take("encoder_linear.bias", "encoder.bias")
    W_dec = tensors.take("decoder_linear.weight", "decoder.weight").T
    b_dec = tensors.take("decoder_linear.bias", "decoder.bias")
    tensors.done()
    layer = re.search(r"(?<![a-zA-Z])[lL](\d+)", path.stem)
    if site is None and layer is None:
        raise ValueError(f"{path} does not tell its layer: its name holds no l19. Give site=...")
    return SparseAutoencoder(
        site or Site(int(layer[1]) if layer else 0, "resid_post"),
        W_enc, b_enc, W_dec, b_dec, "relu" if k is None else "topk",
        k=k or 0,
        birth=Birth("linear layers", str(path)),
    )  # fmt: skip
