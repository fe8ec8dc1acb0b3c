"""From the stream to logits, as a family does it: final norm, unembedding, a factor, a cap."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.model.architectures import architecture_of, config_of
from probes.model.placing.sums import close
from probes.model.quantised import device_of

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # keys of configs


@dataclass(frozen=True, eq=False)
class Unembedding:
    """cap * tanh(factor * head(norm(x)) / cap), without what a family does not have.

    The factor is measured, as configs name it in many ways, multiply by it or divide.
    """

    norm: nn.Module | None
    head: nn.Module
    factor: float
    cap: float | None

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: PreTrainedModel, stream: Float[Tensor, "batch d_model"], logits: Float[Tensor, "batch d_vocab"]
    ) -> "Unembedding":
        """That of a model, held to its own logits after the last stream `stream`.

        Raises ValueError, naming the family, where something else stands between them.
        """
        path, head = architecture_of(model).final_norm, model.get_output_embeddings()
        if head is None:
            raise ValueError(f"A {type(model).__name__} has no unembedding to read the stream with.")
        plain = cls(model.get_submodule(path) if path else None, head, 1.0, None)
        read, own = plain.uncapped(stream).double(), logits.double().to(stream.device)
        config = config_of(model)
        caps = [float(cap) for key in _CAPS if (cap := getattr(config, key, None))]
        for cap in (*caps, None):
            linear = own if cap is None else cap * torch.atanh((own / cap).clamp(-1 + 1e-12, 1 - 1e-12))
            factor = float((linear * read).sum() / (read * read).sum().clamp(min=1e-30))
            found = cls(plain.norm, head, 1.0 if abs(factor - 1) < _slack(model) else factor, cap)
            if close(found(stream), logits):
                return found
        raise ValueError(
            f"The logits of this {config.model_type} are not its unembedding of the final norm of the last "
            "resid_post, times a number: a lens would not end in what the model says."
        )

    def uncapped(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """The logits before the cap, in float32."""
        if self.norm is not None:
            x = self.norm(x.to(device_of(self.norm)) if any(True for _ in self.norm.parameters()) else x)
        logits: Tensor = self.head(x.to(device_of(self.head))).float()
        return logits * self.factor

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        logits = self.uncapped(x)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def _slack(model: PreTrainedModel) -> float:
    """How far from 1 the factor of a model that has none may be measured."""
    return 1e-5 if model.dtype in (torch.float32, torch.float64) else 1e-2
