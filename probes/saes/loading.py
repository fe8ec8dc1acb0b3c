"""An autoencoder by name: a folder or file in any layout that is known, a repository's part, or an embedded one."""

from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from probes.files import reading
from probes.model.sites import Site
from probes.saes.formats import dictionary_learning, saelens, scopes, sparsify
from probes.saes.sae import SparseAutoencoder

EMBEDDED = Path(__file__).parent / "embedded"


def load_sae(
    source: str | Path,
    *,
    part: str = "",
    site: Site | str | None = None,
    k: int | None = None,
    pickle: bool = False,
    dtype: torch.dtype = torch.float32,
) -> SparseAutoencoder:
    """A sparse autoencoder or transcoder in the layout of SAELens 6, sparsify, dictionary_learning, Llama-Scope-R1,
    Gemma Scope, Qwen-Scope, or a `.pt` with two linear layers.

    `source` is a folder, a file, a repository of the hub, of which `part` is the folder or file within, or an embedded
    one (`organism-L1`, `reasoner-L15`). `site` overrules what a label says, `k` gives what some files do not say.
    Pickles are read only with `pickle`, their weights alone. What a file says of itself is taken for its word here:
    `check_sae` asks the model. Raises ValueError, naming file and reason, for what is not known; FileNotFoundError.

    >>> from pathlib import Path
    >>> from probes.saes import SparseAutoencoder, load_sae, save_sae
    >>> save_sae(SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=128, k=8), Path("mine"))
    >>> load_sae("mine")
    SparseAutoencoder(L2.resid_post, 128 latents of 96, topk)
    """
    site = Site.parse(site) if isinstance(site, str) else site
    path = _path(source, part)
    with reading(path, "autoencoder"):
        sae = _read(path, site=site, k=k, pickle=pickle, dtype=dtype)
    if path.parent == EMBEDDED and sae.birth is not None:  # by its name, not by where this package lies
        sae = replace(sae, birth=replace(sae.birth, source=path.name))
    return sae


def save_sae(
    sae: SparseAutoencoder, folder: Path, *, model: str = "", licence: str = "", dtype: torch.dtype = torch.float32
) -> None:
    """Written as SAELens 6 reads it, which `load_sae` reads, too: in float32, or bfloat16 for half the size.

    `model` is the one that it belongs to, `licence` what it may be used under. Raises ValueError for a transcoder.

    >>> from pathlib import Path
    >>> from probes.saes import SparseAutoencoder, load_sae, save_sae
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=128, k=8)
    >>> save_sae(sae, Path("mine"))
    >>> bool((load_sae("mine").W_dec == sae.W_dec).all())
    True
    """
    saelens.write(sae, Path(folder), model, licence, dtype)


def _read(path: Path, *, site: Site | None, k: int | None, pickle: bool, dtype: torch.dtype) -> SparseAutoencoder:
    if path.is_file():
        reader = scopes.read_qwen_scope if path.name.endswith(".sae.pt") else scopes.read_linear
        return reader(path, site=site, dtype=dtype, pickle=pickle, k=k)
    if all((path / name).is_file() for name in dictionary_learning.FILES):
        return dictionary_learning.read(path, site=site, dtype=dtype, pickle=pickle)
    for files, read in (
        (saelens.FILES, saelens.read),
        (sparsify.FILES, sparsify.read),
        (scopes.LLAMA, scopes.read_llama_scope),
    ):
        if all((path / name).is_file() for name in files):
            return read(path, site=site, dtype=dtype)
    if any((path / name).is_file() for name in scopes.GEMMA):
        return scopes.read_gemma_scope(path, site=site, dtype=dtype)
    held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{path} holds {held}, which is no autoencoder in a known layout: cfg.json with sae_weights.safetensors "
        "(SAELens) or sae.safetensors (sparsify), ae.pt with config.json (dictionary_learning), config.json with "
        "sae_weights.safetensors (Llama-Scope), params.npz or params.safetensors (Gemma Scope), or a .pt file."
    )


def _path(source: str | Path, part: str) -> Path:
    known = sorted(place.name for place in EMBEDDED.iterdir())
    if str(source) in known:
        return EMBEDDED / str(source)
    path = Path(source) / part
    if path.exists():
        return path
    if (
        Path(source).exists()
        or Path(source).is_absolute()
        or str(source).startswith(".")
        or str(source).count("/") != 1
    ):
        raise FileNotFoundError(f"{path} is not there, and {source} is no embedded autoencoder ({', '.join(known)}).")
    wanted = [f"{part}/*", part] if part else None
    return Path(snapshot_download(str(source), allow_patterns=wanted)) / part
