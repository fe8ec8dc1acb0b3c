"""What each attention head writes along a direction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations._record import record
from probes.model.architectures import attn_gain, head_matrices, layers_with_heads, n_heads, n_layers
from probes.model.sites import Site
from probes.tables import Shown, Table
from probes.thinking.spans import Span

if TYPE_CHECKING:
    import pandas

Head = tuple[int, int]


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Shown):
    """One number for each head; `meaning` says which.

    >>> import torch
    >>> from probes.activations import HeadScores
    >>> scores = HeadScores(torch.tensor([[0.1, -0.4], [0.7, 0.2]]), "write along the length direction")
    >>> scores.top(2), scores.bottom(1)
    ([(1, 0), (1, 1)], [(0, 1)])
    >>> print(scores.table(2))
    write along the
    length direction
    ┏━━━━━━┳━━━━━━━┓
    ┃ head ┃ score ┃
    ┡━━━━━━╇━━━━━━━┩
    │ L1H0 │   0.7 │
    │ L1H1 │   0.2 │
    └──────┴───────┘
    """

    scores: Float[Tensor, "n_layers n_heads"]
    meaning: str

    def top(self, k: int) -> list[Head]:
        """The k heads with the highest score, by signed value, highest first."""
        return self._ranked()[:k]

    def bottom(self, k: int) -> list[Head]:
        """The k heads with the lowest score, lowest first."""
        return self._ranked()[-k:][::-1]

    def __getitem__(self, head: Head) -> float:
        """The score of one head, `(layer, head)`."""
        return float(self.scores[head])

    def _ranked(self) -> list[Head]:
        width = self.scores.shape[1]
        ranked = self.scores.flatten().sort(descending=True, stable=True)
        return [(i // width, i % width) for i in ranked.indices[~ranked.values.isnan()].tolist()]

    def table(self, k: int = 10) -> Table:
        """The k highest, highest first."""
        rows = tuple((f"L{layer}H{head}", self[layer, head]) for layer, head in self.top(k))
        return Table(("head", "score"), rows, self.meaning)

    def to_frame(self) -> "pandas.DataFrame":
        """All heads as a frame of pandas, highest first."""
        return self.table(self.scores.numel()).to_frame()


def written_unit(model: PreTrainedModel, layer: int, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """The unit vector to look for in the output of `o_proj`, so as to look for `vector` in the stream.

    It is v̂ itself, or u = g⊙v̂/‖g⊙v̂‖ where a norm with gain g stands between `o_proj` and the stream.

    >>> import torch
    >>> from probes import load
    >>> from probes.activations import written_unit
    >>> written_unit(load("organism"), 0, 2 * torch.eye(96)[1])[:4]  # no norm stands between
    tensor([0., 1., 0., 0.])
    """
    gain = attn_gain(model, layer)
    wanted = vector if gain is None else vector * gain.to(vector.device)
    out: Tensor = wanted / wanted.norm()
    return out


Inputs = Mapping[int, Float[Tensor, " d_in"]]  # of o_proj, by layer


@torch.no_grad()
def head_writes(
    model: PreTrainedModel, spans: Sequence[Span], vectors: Mapping[int, Float[Tensor, " d_model"]]
) -> Float[Tensor, "n_layers n_heads"]:
    """Mean over spans of ⟨head's mean write, vector of its layer⟩; NaN in layers without a vector or without heads,
    and where a layer has fewer heads than another. Raises ValueError where no layer has heads.

    The write is linear in z, so it is never built: z's mean is taken first, and u_h = W_hᵀ v once for each head. In
    activation units where the vectors are unit vectors; it ranks the heads that ThinkEdit edits *(Sun et al. 2025)*.

    >>> from probes import direction_between, generate, head_writes, load
    >>> from probes.thinking import thinking
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7 quick"])
    >>> direction = direction_between(model, ["a 3 quick"], ["a 3"], "L0.resid_mid", position="text_last")
    >>> writes = head_writes(model, [thinking(completion)], {0: direction.unit})
    >>> writes.shape, f"L0H{int(writes[0].argmax())}"
    (torch.Size([4, 8]), 'L0H2')
    """
    return writes_along(model, mean_inputs(model, spans, layers_to_read(model, list(vectors))), vectors)


def layers_to_read(model: PreTrainedModel, layers: Sequence[int]) -> list[int]:
    """Those of the layers that have heads; where none has, the first, which reading refuses by name."""
    having = layers_with_heads(model)
    return [layer for layer in layers if layer in having] or list(layers)[:1]


def mean_inputs(model: PreTrainedModel, spans: Sequence[Span], layers: Sequence[int]) -> Inputs:
    """What `o_proj` reads in each of the layers, the mean over spans: all that mean writes need of them."""
    moments = record(model, spans, [Site(layer, "z") for layer in layers], label="reading heads")
    return {layer: moments[Site(layer, "z")].activation.mean for layer in layers}


@torch.no_grad()
def writes_along(
    model: PreTrainedModel, inputs: Inputs, vectors: Mapping[int, Float[Tensor, " d_model"]]
) -> Float[Tensor, "n_layers n_heads"]:
    """`head_writes` of spans whose mean inputs are known; NaN in layers of which they are not."""
    out = torch.full((n_layers(model), n_heads(model)), float("nan"), dtype=torch.float64)
    for layer in inputs.keys() & vectors.keys():
        matrices = head_matrices(model, layer).double()
        z = inputs[layer].to(matrices.device).unflatten(0, (n_heads(model, layer), -1))
        u = torch.einsum("dhk,d->hk", matrices, vectors[layer].double().to(matrices.device))
        out[layer, : len(z)] = (z * u).sum(-1).cpu()
    return out
