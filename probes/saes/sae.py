"""A sparse autoencoder: activations in, a few active latents, and the activations that these stand for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from probes.model.sites import Site
from probes.tables import Shown, Table
from probes.words import checked

Activation = Literal["relu", "jumprelu", "topk"]
Normalisation = Literal["none", "layer", "length"]


@runtime_checkable
class Autoencoder(Protocol):
    """What is asked of a sparse autoencoder: all else here works with any that has this.

    `site` is where it reads, `out_site` what it reconstructs: the same, but for a transcoder. Activations are
    [*batch width], in the model's own units.

    >>> from probes import load
    >>> from probes.saes import Autoencoder, SparseAutoencoder
    >>> sae = SparseAutoencoder.at_random("L2.resid_post", d_in=96, d_sae=256, k=8)
    >>> isinstance(sae, Autoencoder)
    True
    """

    @property
    def site(self) -> Site: ...
    @property
    def out_site(self) -> Site: ...
    @property
    def d_sae(self) -> int: ...
    @property
    def decoder(self) -> Float[Tensor, "d_sae d_out"]: ...
    @property
    def unit(self) -> float: ...

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]: ...

    def encode_at(self, x: Float[Tensor, "*batch d_in"], latents: Sequence[int]) -> Float[Tensor, "*batch n"]: ...

    def decode(
        self, f: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """`x` is what was encoded: of it come the units, and a skip connection."""
        ...


@checked
@dataclass(frozen=True, eq=False, repr=False)
class SparseAutoencoder(Shown):
    """f = act((x' - b_dec) W_enc + b_enc), x̂ = f W_dec + b_dec, in units x' in which it was trained.

    `activation`: `relu`; `jumprelu`, relu where the pre-activation is above `threshold`; `topk`, relu of the `k`
    largest. `b_dec` is taken off the input where `centred`. `normalisation`: x' = scale x (`none`); (x - mean) / std of
    the activation, times scale (`layer`); scale x / ‖x‖ (`length`). Decoding undoes it. A transcoder reconstructs
    `output`, in its plain units, and may add `W_skip`. Raises ValueError where shapes do not fit together.

    >>> import torch
    >>> from probes import Site
    >>> from probes.saes import SparseAutoencoder
    >>> eye = torch.eye(2)
    >>> sae = SparseAutoencoder(Site(0, "resid_post"), eye, torch.zeros(2), eye, torch.ones(2), centred=True)
    >>> x = torch.tensor([3.0, 0.0])
    >>> sae.encode(x), sae(x)
    (tensor([2., 0.]), tensor([3., 1.]))
    """

    site: Site
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    activation: Activation = "relu"
    threshold: Float[Tensor, " d_sae"] | None = None
    k: int = 0
    centred: bool = False
    normalisation: Normalisation = "none"
    scale: float = 1.0
    output: Site | None = None
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    birth: "Birth | None" = None

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    @checked
    def at_random(
        cls, site: Site | str, *, d_in: int, d_sae: int, k: int = 0, activation: Activation = "topk", seed: int = 0
    ) -> "SparseAutoencoder":
        """With tied matrices of unit rows: what training begins with, and a null to compare with."""
        numbers = torch.Generator().manual_seed(seed)
        W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=numbers), dim=1)
        threshold = torch.zeros(d_sae) if activation == "jumprelu" else None
        site = Site.parse(site) if isinstance(site, str) else site
        return cls(site, W_dec.T.clone(), torch.zeros(d_sae), W_dec, torch.zeros(d_in), activation, threshold, k)

    @property
    def out_site(self) -> Site:
        """What it reconstructs."""
        return self.site if self.output is None else self.output

    @property
    def is_transcoder(self) -> bool:
        return self.out_site != self.site

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def decoder(self) -> Float[Tensor, "d_sae d_out"]:
        return self.W_dec

    def to(self, device: torch.device | str) -> "SparseAutoencoder":
        """The same on another device."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
        moved = {name: value.to(device) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **moved)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The latents' activations, in float32."""
        return self._active(self._pre(x, slice(None)), slice(None))

    def encode_at(self, x: Float[Tensor, "*batch d_in"], latents: Sequence[int]) -> Float[Tensor, "*batch n"]:
        """`encode` at these latents alone; of a `topk` all have to be computed, to know which are the largest."""
        at = torch.as_tensor(list(latents), device=self.W_enc.device)
        if self.activation == "topk":
            return self.encode(x)[..., at]
        return self._active(self._pre(x, at), at)

    def decode(
        self, f: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """What the latents stand for, in the model's units, which depend on `x`, what was encoded, where each
        activation is normalised by itself, or skips. Raises ValueError where it is needed and not given."""
        if x is None and (self.normalisation != "none" or self.W_skip is not None):
            raise ValueError("This autoencoder's output depends on its input beside the latents: give decode(f, x).")
        out: Tensor = f @ self.W_dec + self.b_dec
        if self.W_skip is not None:
            assert x is not None
            out = out + x.float() @ self.W_skip
        if self.is_transcoder:
            return out
        if x is None or self.normalisation == "none":
            return out / self.scale
        offset, factor = self._units(x)
        return out / factor + offset

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction."""
        return self.decode(self.encode(x), x)

    def step(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch 1"] | float:
        """What a change of a latent by 1 is multiplied by, along its decoder row, in the model's units."""
        if self.is_transcoder or self.normalisation == "none":
            return self.unit
        return 1 / self._units(x)[1]

    @property
    def unit(self) -> float:
        """What a decoder row is multiplied by in the model's units; of each activation's own, where it is normalised by
        itself, no one number holds, and rows stay as they are."""
        return 1.0 if self.is_transcoder or self.normalisation != "none" else 1 / self.scale

    def table(self) -> Table:
        """What it is, and where it comes from."""
        site, d_out = str(self.site), self.W_dec.shape[1]
        rows = [
            ("reads", site),
            ("reconstructs", str(self.out_site)),
            ("latents", self.d_sae),
            ("activation", f"top {self.k}" if self.activation == "topk" else self.activation),
            ("width", self.d_in if d_out == self.d_in else f"{self.d_in} to {d_out}"),
            ("normalisation", self.normalisation if self.normalisation != "none" else f"by {self.scale:g}"),
            ("b_dec off the input", "yes" if self.centred else "no"),
            *(() if self.birth is None else self.birth.rows()),
        ]
        kind = "Transcoder" if self.is_transcoder else "Sparse autoencoder"
        return Table((kind, ""), tuple(rows))

    def __repr__(self) -> str:
        where = f"{self.site} to {self.out_site}" if self.is_transcoder else str(self.site)
        return f"SparseAutoencoder({where}, {self.d_sae:,} latents of {self.d_in}, {self.activation})"

    def _units(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What is taken off an activation, and what it is then multiplied by."""
        wide, tiny = x.float(), 1e-5
        if self.normalisation == "layer":
            mean = wide.mean(-1, keepdim=True)
            return mean, self.scale / ((wide - mean).std(-1, keepdim=True) + tiny)
        if self.normalisation == "length":
            return 0.0, self.scale / wide.norm(dim=-1, keepdim=True).clamp(min=tiny)
        return 0.0, self.scale

    def _pre(self, x: Tensor, at: Any) -> Tensor:
        offset, factor = self._units(x)
        scaled = (x.float() - offset) * factor
        if self.centred:
            scaled = scaled - self.b_dec
        out: Tensor = scaled @ self.W_enc[:, at] + self.b_enc[at]
        return out

    def _active(self, pre: Tensor, at: Any) -> Tensor:
        if self.activation == "jumprelu":
            assert self.threshold is not None
            return torch.relu(pre) * (pre > self.threshold[at])
        if self.activation == "topk":
            top = torch.relu(pre).topk(self.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, top.indices, top.values)
        return torch.relu(pre)


@dataclass(frozen=True)
class Birth:
    """Where an autoencoder comes from: the file's format and name, the model it says it was trained on, its licence.

    >>> from probes.saes import Birth
    >>> Birth("SAELens", "sae", model="organism").rows()
    [('format', 'SAELens'), ('source', 'sae'), ('model', 'organism')]
    """

    format: str
    source: str
    model: str = ""
    licence: str = ""
    note: str = ""

    def rows(self) -> list[tuple[str, str]]:
        """Those that are known."""
        names = ("format", "source", "model", "licence", "note")
        return [(name, value) for name in names if (value := getattr(self, name))]


def _check(sae: SparseAutoencoder) -> None:
    d_in, d_sae = sae.W_enc.shape
    d_out = sae.W_dec.shape[1]
    wanted = {
        "b_enc": [d_sae],
        "W_dec": [d_sae, d_out],
        "b_dec": [d_out],
        "threshold": [d_sae],
        "W_skip": [d_in, d_out],
    }
    for name, shape in wanted.items():
        value = getattr(sae, name)
        if value is not None and list(value.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)}, and with W_enc {[d_in, d_sae]} it needs {shape}. "
                "Is a matrix stored the other way round?"
            )
    if sae.centred and d_in != d_out:
        raise ValueError("A transcoder between widths cannot take b_dec, which is of the output, off its input.")
    if (sae.threshold is not None) != (sae.activation == "jumprelu"):
        raise ValueError("A threshold belongs to jumprelu: give both, or neither.")
    if sae.activation == "topk" and not 1 <= sae.k <= d_sae:
        raise ValueError(f"topk needs k from 1 to the {d_sae} latents, but got {sae.k}.")
    for name in ("W_enc", "b_enc", *wanted):
        value = getattr(sae, name)
        if value is not None and not (value.is_floating_point() and value.isfinite().all()):
            raise ValueError(
                f"{name} holds NaN, infinite or other entries: the file is damaged, or its dtype too small."
            )
