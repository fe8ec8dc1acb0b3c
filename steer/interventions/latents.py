"""Latents of a sparse autoencoder set to values, what it does not explain left as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from probes.directions.vector import check_number
from probes.model.architectures import tap_of, width_of
from probes.model.sites import Site
from probes.saes.sae import Activation, Normalisation, SparseAutoencoder
from probes.tables import Brief
from probes.words import checked
from steer.interventions.affine import widened


@checked
@dataclass(frozen=True, eq=False, repr=False)
class SetLatents(Brief):
    """x + strength * (target - f(x)) W_dec, for some latents f of a sparse autoencoder; the rest of x stays.

    The clamp of Galichin et al. (2025), with target = gamma times the latent's largest activation; a target of 0
    ablates. What is needed of the autoencoder is held here, so that a recipe travels without it: the columns that read
    these latents, and their decoder rows; of a `topk` the whole encoder, which says which are the largest. In the
    autoencoder's units, which are undone before the change enters the stream. Not linear.

    >>> import torch
    >>> from probes import Site
    >>> from probes.saes import SparseAutoencoder
    >>> from steer import SetLatents
    >>> eye = torch.eye(2)
    >>> sae = SparseAutoencoder(Site(2, "resid_post"), eye, torch.zeros(2), eye, torch.zeros(2))
    >>> SetLatents.of(sae, {0: 5.0})(torch.tensor([3.0, 1.0]))
    tensor([5., 1.])
    >>> SetLatents.of(sae, {0: 0.0})(torch.tensor([3.0, 1.0]))
    tensor([0., 1.])
    """

    kind: ClassVar[str] = "set latents"
    vector: ClassVar[None] = None
    birth: ClassVar[None] = None
    site: Site
    strength: float
    activation: Activation
    k: int
    centred: bool
    normalisation: Normalisation
    scale: float
    latents: Int[Tensor, " n"] = field(metadata={"tensor": True})
    targets: Float[Tensor, " n"] = field(metadata={"tensor": True})
    W_enc: Float[Tensor, "width read"] = field(metadata={"tensor": True})
    b_enc: Float[Tensor, " read"] = field(metadata={"tensor": True})
    threshold: Float[Tensor, " read"] = field(metadata={"tensor": True})
    b_dec: Float[Tensor, " width"] = field(metadata={"tensor": True})
    W_dec: Float[Tensor, "n width"] = field(metadata={"tensor": True})

    @classmethod
    def of(cls, sae: SparseAutoencoder, targets: Mapping[int, float], strength: float = 1.0) -> "SetLatents":
        """Set these latents of an autoencoder to these activations. Raises ValueError for a transcoder, and for a
        latent that it has not."""
        if sae.is_transcoder:
            raise ValueError(
                f"{sae!r} reads one site and writes another: what it encodes is not there to be set. Add its decoder "
                "row instead: Add.of(probes.saes.latent_direction(...), strength)."
            )
        if unknown := [latent for latent in targets if not 0 <= latent < sae.d_sae]:
            raise ValueError(f"Latent {unknown[0]} is not one of the {sae.d_sae:,} latents, 0 to {sae.d_sae - 1}.")
        at = torch.tensor(list(targets))
        read = slice(None) if sae.activation == "topk" else at
        return cls(
            site=sae.site,
            strength=strength,
            activation=sae.activation,
            k=sae.k,
            centred=sae.centred,
            normalisation=sae.normalisation,
            scale=sae.scale,
            latents=at if sae.activation == "topk" else torch.arange(len(at)),
            targets=torch.tensor([float(targets[latent]) for latent in targets]),
            W_enc=sae.W_enc[:, read].float(),
            b_enc=sae.b_enc[read].float(),
            threshold=(torch.zeros(sae.d_sae) if sae.threshold is None else sae.threshold.float())[read],
            b_dec=sae.b_dec.float(),
            W_dec=sae.W_dec[at].float(),
        )

    @classmethod
    def ablating(cls, sae: SparseAutoencoder, latents: Sequence[int], strength: float = 1.0) -> "SetLatents":
        """Take what these latents stand for out of the activation."""
        return cls.of(sae, dict.fromkeys(latents, 0.0), strength)

    def __post_init__(self) -> None:
        check_number(self.strength, "strength", f"The {self.kind} at {self.site}")
        if self.latents.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"latents of the {self.kind} at {self.site} are {self.latents.dtype}, not whole numbers.")
        for name in ("targets", "W_enc", "b_enc", "threshold", "b_dec", "W_dec"):
            if not (held := getattr(self, name)).is_floating_point() or not held.isfinite().all():
                raise ValueError(f"{name} of the {self.kind} at {self.site} holds NaN, infinite or other entries.")
        n, width = len(self.targets), self.W_enc.shape[0]
        wanted = {"latents": [n], "W_dec": [n, width], "b_dec": [width], "b_enc": [self.W_enc.shape[1]]}
        for name, shape in {**wanted, "threshold": wanted["b_enc"]}.items():
            if list(getattr(self, name).shape) != shape:
                raise ValueError(
                    f"The {self.kind} at {self.site} has {name} {list(getattr(self, name).shape)}, not {shape}."
                )
        if self.activation != "topk" and self.W_enc.shape[1] != n:
            raise ValueError(f"The {self.kind} at {self.site} reads {self.W_enc.shape[1]} latents, and sets {n}.")
        if not n or not bool(((self.latents >= 0) & (self.latents < self.W_enc.shape[1])).all()):
            raise ValueError(f"The {self.kind} at {self.site} sets latents that it does not read.")

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the model has no such site, or it is of another width."""
        tap_of(model, self.site)
        if (width := width_of(model, self.site)) != self.W_enc.shape[0]:
            raise ValueError(
                f"The autoencoder at {self.site} is of width {self.W_enc.shape[0]}, but the activation has {width}."
            )

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        wide = widened(x)
        f = self._sae.encode(wide)[..., self.latents]
        change = (self.targets - f) @ self.W_dec
        return (wide + self.strength * change * self._sae.step(wide)).to(x.dtype)

    @cached_property
    def _sae(self) -> SparseAutoencoder:
        """Of what is read; it decodes nothing."""
        return SparseAutoencoder(
            self.site, self.W_enc, self.b_enc, self.W_enc.T, self.b_dec, self.activation,
            self.threshold if self.activation == "jumprelu" else None, self.k, self.centred, self.normalisation,
            self.scale,
        )  # fmt: skip
