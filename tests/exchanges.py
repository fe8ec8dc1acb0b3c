"""What the tests of neighbours' files share: recipes that a format holds, and control vectors as others write them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import PreTrainedModel

from probes.model.sites import Site
from steer.interventions.activation import Ablate, Add, Rotate
from steer.recipes.recipe import Recipe, Step
from steer.recipes.scope import Scope
from steer.runtime._applied import applied

POST = [Site(layer, "resid_post") for layer in range(3)]
NAMES = {"gguf": "v.gguf", "easysteer": "v.json", "vllm-lens": "v.json", "lm-eval": "v.pt"}
TOKENS = torch.tensor([[1, 7, 5, 3, 8, 9, 4, 10], [1, 12, 13, 5, 3, 14, 15, 16]])


def vector(seed: int = 2, width: int = 32) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, recipe: Recipe | None = None) -> torch.Tensor:
    with applied(model, recipe or Recipe.of(model, [])):
        out: torch.Tensor = model(TOKENS).logits
    return out


def recipe_for(model: PreTrainedModel, name: str) -> Recipe:
    """All that a format holds."""
    steps = [Step(Add(POST[1], vector(3), -0.4)), Step(Add(POST[2], vector(4)))]
    if name != "gguf":
        steps.insert(0, Step(Add(POST[0], vector(2), 0.7)))
    if name == "easysteer":
        steps += [Step(Rotate(POST[1], vector(5), 2.0), Scope(tokens=(9, 5))), Step(Ablate(POST[0], 1e-3 * vector(6)))]
    else:
        steps.append(Step(Add(POST[1], vector(7), 0.3)))  # two at one site
    if name == "lm-eval":
        steps += [Step(Ablate(Site(1, "attn_out"), vector(8), target=1.5)), Step(Add(Site(0, "mlp_out"), vector(9)))]
    return Recipe(tuple(steps), Recipe.of(model, []).model, "by hand")


def control_vector(
    path: Path,
    directions: Mapping[str, Any],
    *,
    arch: str = "controlvector",
    more: Sequence[tuple[str, str, Any]] = (),
) -> None:
    """A GGUF file as others may write it."""
    writer = gguf.GGUFWriter(path, arch)
    for method, key, value in more:
        getattr(writer, f"add_{method}")(key, value)
    for name, array in directions.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
