"""SAELens 6: `cfg.json` and `sae_weights.safetensors`; files of before version 6 are read where they say enough."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from probes.fields import keys_of
from probes.files import staged_folder
from probes.model.sites import Site
from probes.saes.formats.parts import Side, Tensors, known, site_of, tensors_of
from probes.saes.sae import Activation, Birth, Normalisation, SparseAutoencoder
from probes.tensors import write_tensors
from probes.texts import read_json

FILES = ("cfg.json", "sae_weights.safetensors")
_ACTIVATIONS: Mapping[str, Activation] = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_NORMALISATIONS: Mapping[Any, Normalisation] = {
    None: "none", "none": "none", "layer_norm": "layer", "constant_norm_rescale": "length",
}  # fmt: skip


def read(folder: Path, *, site: Site | None, dtype: torch.dtype) -> SparseAutoencoder:
    """Raises ValueError, naming the file, for an architecture or a setting that is not known."""
    where, config = str(folder / FILES[0]), read_json(folder / FILES[0], "config of an autoencoder", finite=False)
    config = dict(keys_of(config, where))
    meta = {**config, **keys_of(config.get("metadata") or {}, f"metadata in {where}")}
    old = "metadata" not in config
    architecture = "topk" if config.get("activation_fn_str") == "topk" else config.get("architecture", "standard")
    activation = known({"architecture": architecture}, "architecture", _ACTIVATIONS, where)
    if config.get("finetuning_scaling_factor"):
        raise ValueError(f"{where} has a finetuning_scaling_factor, which is not read here: fold it into the decoder.")
    if config.get("reshape_activations") not in (None, "none", "hook_z"):
        raise ValueError(f"{where} has reshape_activations {config['reshape_activations']!r}. Known: none, hook_z.")
    tensors = Tensors(tensors_of(folder / FILES[1]), str(folder / FILES[1]), dtype)
    W_enc, b_enc, W_dec, b_dec = (tensors.take(name) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    threshold = tensors.take("threshold") if activation == "jumprelu" else None
    W_skip = tensors.maybe("W_skip")
    tensors.done()
    if activation == "topk" and config.get("rescale_acts_by_decoder_norm"):
        norms = W_dec.norm(dim=1)  # its latents are the largest after this
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    normalisation = known(config, "normalize_activations", _NORMALISATIONS, where)
    transcodes = "transcoder" in str(architecture)
    side: Side = "input" if transcodes else "output"
    reads = site or site_of(str(_first(meta, "hook_name", "hook_point")), where, side=side)
    writes = meta.get("hook_name_out")
    if transcodes and writes is None:
        raise ValueError(f"{where} is a transcoder that does not say where it writes: it lacks hook_name_out.")
    k = config.get("k") or keys_of(config.get("activation_fn_kwargs") or {}, where).get("k") or 0
    return SparseAutoencoder(
        reads, W_enc, b_enc, W_dec, b_dec, activation, threshold,
        k=int(k) if activation == "topk" else 0,
        centred=bool(config.get("apply_b_dec_to_input", old)) and not transcodes,  # the default of before version 6
        normalisation=normalisation,
        scale=W_enc.shape[0] ** 0.5 if normalisation == "length" else 1.0,
        output=site_of(str(writes), where) if transcodes else None,
        W_skip=None if W_skip is None else W_skip.T,
        birth=Birth("SAELens", str(folder), str(meta.get("model_name") or ""), str(meta.get("licence") or "")),
    )  # fmt: skip


def write(sae: SparseAutoencoder, folder: Path, model: str, licence: str, dtype: torch.dtype) -> None:
    """As SAELens 6 reads it. Raises ValueError for what it has no words for."""
    if sae.is_transcoder or sae.normalisation != "none" or sae.scale != 1.0:
        raise ValueError(f"{sae!r} is not written for SAELens: only autoencoders in the model's plain units are.")
    config: dict[str, Any] = {
        "architecture": {"relu": "standard"}.get(sae.activation, sae.activation),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "hook_name": sae.site.transformer_lens,
            "model_name": model,
            "licence": licence,
            "sae_lens_version": "6.0.0",
        },
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if sae.activation == "topk" else {}),
    }
    tensors = {name: getattr(sae, name).to(dtype) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold.to(dtype)
    with staged_folder(folder) as stage:
        (stage / FILES[0]).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(stage / FILES[1], tensors)


def _first(fields: Mapping[str, Any], *names: str) -> Any:
    return next((fields[name] for name in names if fields.get(name)), None)
