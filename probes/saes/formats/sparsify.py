"""sparsify (EleutherAI): `layers.3/cfg.json` and `sae.safetensors`; the folder's name is the module that was hooked."""

from pathlib import Path

import torch

from probes.fields import keys_of
from probes.model.sites import Site
from probes.saes.formats.parts import Tensors, known, site_of, tensors_of
from probes.saes.sae import Birth, SparseAutoencoder
from probes.texts import read_json

FILES = ("cfg.json", "sae.safetensors")


def read(folder: Path, *, site: Site | None, dtype: torch.dtype) -> SparseAutoencoder:
    """`W_dec` is [num_latents, d_in] there already. The name `layers.3.mlp` is the MLP's output, not the block's, and
    of a transcoder its input and its output. Raises ValueError, naming the file, for what is not known."""
    where, config = str(folder / FILES[0]), read_json(folder / FILES[0], "config of an autoencoder")
    config = keys_of(config, where)
    known(config, "activation", {"topk": "topk"}, where, default="topk")
    if config.get("multi_topk") and not config.get("k"):
        raise ValueError(f"{where} has multi_topk and no k.")
    transcodes = bool(config.get("transcode"))
    tensors = Tensors(tensors_of(folder / FILES[1]), str(folder / FILES[1]), dtype)
    W_enc = tensors.take("encoder.weight").T
    b_enc, W_dec, b_dec = tensors.take("encoder.bias"), tensors.take("W_dec"), tensors.take("b_dec")
    W_skip = tensors.maybe("W_skip")
    tensors.done()
    whole = read_json(folder.parent / "config.json", "config") if (folder.parent / "config.json").is_file() else {}
    return SparseAutoencoder(
        site or site_of(folder.name, where, side="input" if transcodes else "output"),
        W_enc, b_enc, W_dec, b_dec, "topk",
        k=int(config.get("k") or 0),
        centred=not transcodes,
        output=site_of(folder.name, where) if transcodes else None,
        W_skip=None if W_skip is None else W_skip.T,
        birth=Birth("sparsify", str(folder), str(keys_of(whole, "config.json").get("model") or "")),
    )  # fmt: skip
