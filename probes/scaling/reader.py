"""What a worker does: it loads the model by name, says which one that is, and reads shards."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._record import Recorded, record
from probes.activations.experts import ExpertCounts, read_experts
from probes.activations.heads import Inputs, layers_to_read, writes_along
from probes.activations.moments import Moments
from probes.generation.completions import Completion
from probes.model.delimiters import Delimiters
from probes.model.embedded import EMBEDDED
from probes.model.loading import check_source, fingerprint, load, origin_of
from probes.model.passes import edits_of
from probes.model.sites import Site
from probes.thinking.spans import Span


@dataclass(frozen=True)
class Source:
    """What each worker loads, and where. `fingerprint` is that of the model it must be, and None where any will do."""

    name: str
    revision: str | None
    dtype: str
    delimiters: tuple[str, str] | Delimiters | None
    device: str | None
    cpus: int
    fingerprint: str | None


@dataclass(frozen=True)
class Identity:
    """Which model a worker has loaded."""

    fingerprint: str
    dtype: str


def source_of(
    model: str | Path | PreTrainedModel,
    *,
    dtype: str | None,
    delimiters: tuple[str, str] | Delimiters | None,
    revision: str | None,
    device: str | None,
    cpus: int,
) -> Source:
    """A name as it is, or the name, the settings and the fingerprint of a model that is loaded here.

    Raises ValueError for a model that no other process can load by name: one that was built here, or is edited now.
    """
    check_source(model)
    if not isinstance(model, PreTrainedModel):
        return Source(_absolute(str(model)), revision, dtype or "auto", delimiters, device, cpus, None)
    if given := [
        name for name, value in (("dtype", dtype), ("delimiters", delimiters), ("revision", revision)) if value
    ]:
        raise ValueError(f"The model is loaded, and has its own {given[0]}: give {given[0]} with a name alone.")
    if not model.config._name_or_path:
        raise ValueError(
            "The model was built here, so that no worker can load it by name: save it to a folder with its tokenizer, "
            "and give that folder."
        )
    if edits_of(model):
        raise ValueError(
            "The model is edited now, and those that the workers load would not be: leave the block that edits it, or "
            "fold its recipe into a folder, and give that."
        )
    origin = origin_of(model)
    own = str(model.dtype).removeprefix("torch.")
    return Source(_absolute(origin.name), origin.revision, own, origin.given, device, cpus, fingerprint(model))


def _absolute(name: str) -> str:
    """A path means the same wherever a worker stands."""
    return str(Path(name).absolute()) if name not in EMBEDDED and Path(name).exists() else name


class Reader:
    """One model, in one process."""

    def __init__(
        self, source: Source
    ) -> None:  # nothing that can fail: what an actor's `__init__` raises is no sentence
        self.source = source
        self._loaded: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        assert self._loaded is not None
        return self._loaded

    def pid(self) -> int:
        return os.getpid()

    def load(self) -> Identity:
        """Raises ValueError where the weights are not those that are asked for."""
        source = self.source
        torch.set_num_threads(source.cpus)
        model = load(
            source.name,
            revision=source.revision,
            dtype=source.dtype,
            delimiters=source.delimiters,
            device=source.device,
        )
        found = fingerprint(model)
        if source.fingerprint not in (None, found):
            raise ValueError(
                f"A worker loaded other weights by the name {source.name!r} than the model that was given has (their "
                f"fingerprints are {found} and {source.fingerprint}): save the model to a folder, and give that."
            )
        self._loaded = model
        return Identity(found, str(model.dtype))

    def record(self, spans: Sequence[Span], sites: Sequence[Site], keep_sinks: bool) -> dict[Site, Recorded]:
        """`probes.record` of a shard, on the CPU."""
        found = record(self.model, spans, sites, keep_sinks=keep_sinks, label="")
        return {
            site: Recorded(_here(own.activation), _here(own.norm), own.left_out, _here(own.share))
            for site, own in found.items()
        }

    def count(self, completions: Sequence[Completion], markers: Sequence[str]) -> ExpertCounts:
        """The experts that a shard chooses, as `probes.activations.read_experts` counts them."""
        return read_experts(self.model, completions, markers, label="").total()

    def layers_to_read(self, layers: Sequence[int]) -> list[int]:
        """Those of the layers whose heads can be read."""
        return layers_to_read(self.model, layers)

    def writes(
        self, inputs: Inputs, vectors: Mapping[int, Float[Tensor, " d_model"]]
    ) -> Float[Tensor, "n_layers n_heads"]:
        """What heads write along vectors, by the mean inputs of all spans."""
        return writes_along(self.model, inputs, vectors)


def _here(moments: Moments) -> Moments:
    return Moments(moments.count, moments.total.cpu())
