"""dictionary_learning: `trainer_0/ae.pt`, a pickle of tensors, and `config.json`."""

from pathlib import Path
from typing import Any

import torch

from probes.fields import keys_of
from probes.model.sites import Site
from probes.saes.formats.parts import Tensors, known, pickled, site_of
from probes.saes.sae import Activation, Birth, SparseAutoencoder
from probes.texts import read_json

FILES = ("ae.pt", "config.json")
_CLASSES: dict[str, Activation] = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "jumprelu",
    "MatryoshkaBatchTopKSAE": "jumprelu",
    "JumpReluAutoEncoder": "jumprelu",
}


def read(folder: Path, *, site: Site | None, dtype: torch.dtype, pickle: bool) -> SparseAutoencoder:
    """Raises ValueError, naming the file, for a class that is not known, a gated one among them."""
    where, config = str(folder / FILES[1]), read_json(folder / FILES[1], "config of an autoencoder")
    trainer = keys_of(keys_of(config, where).get("trainer"), f"trainer in {where}")
    kind = str(trainer.get("dict_class"))
    activation = known({"dict_class": kind}, "dict_class", _CLASSES, where)
    tensors = Tensors(pickled(folder / FILES[0], pickle), str(folder / FILES[0]), dtype)
    W_enc, W_dec = tensors.maybe("W_enc"), tensors.maybe("W_dec")
    W_enc = tensors.take("encoder.weight").T if W_enc is None else W_enc
    W_dec = tensors.take("decoder.weight").T if W_dec is None else W_dec
    b_enc, b_dec = tensors.take("encoder.bias", "b_enc"), tensors.take("b_dec", "bias", "decoder.bias", "decoder_bias")
    threshold, k = tensors.maybe("threshold"), tensors.maybe("k")
    tensors.done("group_sizes", "active_groups", "decoder_norms")
    if activation == "jumprelu":
        if threshold is None:
            raise ValueError(f"{folder / FILES[0]} lacks threshold, which a {kind} needs.")
        threshold = threshold.expand(W_enc.shape[1]).clone()
    return SparseAutoencoder(
        site or _site(trainer, where),
        W_enc, b_enc, W_dec, b_dec, activation,
        threshold if activation == "jumprelu" else None,
        k=int(trainer.get("k") or (0 if k is None else k)) if activation == "topk" else 0,
        centred=kind not in ("JumpReluAutoEncoder", "AutoEncoderNew"),
        birth=Birth("dictionary_learning", str(folder), str(trainer.get("lm_name") or "")),
    )  # fmt: skip


def _site(trainer: Any, where: str) -> Site:
    """By the submodule's name, `resid_post_layer_3` there, else by a path; a layer alone does not say which site."""
    name = str(trainer.get("submodule_name") or "")
    words = name.split("_layer_")
    if len(words) == 2 and words[1].isdigit() and words[0] in ("resid_post", "mlp_out", "attn_out", "resid_pre"):
        return Site.parse(f"L{words[1]}.{words[0]}")
    return site_of(name or "nothing", where)
