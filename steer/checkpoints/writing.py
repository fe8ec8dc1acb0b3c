"""A model in memory written as a plain checkpoint, and proved."""

from pathlib import Path

from transformers import PreTrainedModel

from probes.model.loading import origin_of
from probes.model.quantised import check_in_memory, check_unwrapped, is_quantised
from steer.checkpoints.carried import carry_over
from steer.checkpoints.conversions import plain
from steer.checkpoints.reloading import prove_model


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """Weights and config in the names and dtypes of a plain checkpoint; then they are read back and compared.

    What the model's source holds and transformers does not load is carried over as it is. Raises ValueError, naming
    the tensor, where a reader would not get this very model, and for one whose weights are quantised, wrapped, or not
    in memory.
    """
    if is_quantised(model):
        raise ValueError(
            f"The weights of {origin_of(model).name!r} are quantised: load the model dequantised, and write it then."
        )
    check_unwrapped(model)
    check_in_memory(model)
    save_weights(model, folder)
    prove_model(folder, model, beside=carry_over(model, folder))


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    with plain(model):
        model.save_pretrained(folder)
