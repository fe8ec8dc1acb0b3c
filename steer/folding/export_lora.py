"""Export a recipe that changes `o_proj` alone as a PEFT LoRA adapter: a few vectors for each layer it changes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.files import staged_folder
from probes.model.architectures import (
    architecture_of,
    layers_with_heads,
    o_proj_bias,
    o_proj_of,
    output_first,
    path_of,
    path_of_o_proj,
    row_at,
)
from probes.model.loading import origin_of
from probes.model.sites import Site
from probes.tables import Brief
from probes.tensors import write_tensors
from steer.checkpoints._diff import Difference, TensorDifference
from steer.checkpoints.card import Section, write_card
from steer.checkpoints.hub import check_repository, push
from steer.checkpoints.proof import Meant, prove_written
from steer.folding._fold import check_weights, drafted
from steer.folding.card import recipe_sections
from steer.folding.draft import NotFoldable, twin_of
from steer.recipes.recipe import Recipe


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Brief):
    """The change of one `o_proj`: y becomes y + (x Aᵀ) Bᵀ + shift. The columns of B are orthonormal."""

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_model rank"]
    shift: Float[Tensor, " d_model"]

    @property
    def rank(self) -> int:
        return len(self.a)


def export_adapter(
    model: PreTrainedModel,
    recipe: Recipe,
    folder: str | Path,
    *,
    sections: Sequence[Section] = (),
    push_to: str | None = None,
    private: bool = True,
) -> Difference:
    """Write the recipe as a LoRA adapter (Hu et al. 2022) to a new folder that plain peft loads, scaling 1.

    Beside the adapter it holds the recipe (`recipe/`) and a card. ThinkEdit's edit has rank 1 in each layer. A shift
    is held by `lora_bias`, which peft applies to any model, and merges only where `o_proj` has a bias of its own.
    The folder appears under its name only when it is whole; `push_to` names a repository that it is then uploaded to.
    Gives the tensors that the adapter changes. Raises NotFoldable for a recipe that changes anything but `o_proj`,
    FileExistsError where the folder exists, ValueError for another model's recipe.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Ablate, Recipe
    >>> from steer.folding import export_adapter
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Ablate(Site(1, "result", head=2), torch.ones(96))])
    >>> changes = export_adapter(model, recipe, "adapter")  # needs peft: the extra [lora]
    >>> [tensor.rank for tensor in changes.tensors]
    [1]
    """
    if find_spec("peft") is None:
        raise ImportError("An adapter is written by the package peft: pip install 'thinksteer[lora]'.")
    check_repository(push_to)
    with staged_folder(Path(folder)) as stage:
        layers = low_rank(model, recipe)
        changes = _changes(model, layers)
        _write_adapter(model, layers, stage)
        (stage / "recipe").mkdir()
        recipe.write(stage / "recipe")
        shifted = any(change.shift.any() for change in layers.values())
        changed = [
            Section("Use", _USE.format(base=origin_of(model).name) + (_SHIFT if shifted else "")),
            *recipe_sections(recipe),
            Section("Tensors that it changes", f"In {origin_of(model).name}.", changes.table()),
        ]
        _write_card(stage / "README.md", model, recipe, [*sections, *changed])
    if push_to is not None:
        push(folder, push_to, private=private)
    return changes


@torch.no_grad()
def low_rank(model: PreTrainedModel, recipe: Recipe) -> dict[int, LowRank]:
    """What the recipe changes in the `o_proj` of each layer that it changes, in float32, of the least rank.

    Raises NotFoldable, naming the tensors, where it changes others.
    """
    recipe.check(model)
    check_weights(model)
    twin = _biased(model)
    draft = drafted(twin, recipe, rounded=False).copies
    layers, ours = {}, set()
    for layer in layers_with_heads(twin):
        weight, bias = o_proj_of(twin, layer).get_parameter("weight"), o_proj_bias(twin, layer)
        assert bias is not None
        ours |= {weight, bias}
        delta, shift = (draft[p] - p.float() if p in draft else torch.zeros_like(p).float() for p in (weight, bias))
        if delta.any() or shift.any():
            turned = output_first(row_at(model, layer), path_of_o_proj(model, layer), delta)
            b, a = _factored(turned, float(weight.float().norm()))
            layers[layer] = LowRank(a.cpu(), b.cpu(), shift.cpu())
    named = (*twin.named_parameters(), *twin.named_buffers())
    if others := [name for name, p in named if p in draft and p not in ours]:
        raise NotFoldable(
            f"The recipe changes {', '.join(others)}, and an adapter of ours holds changes of o_proj alone: "
            "export a checkpoint, or keep it as a run-time intervention."
        )
    if not layers:
        raise NotFoldable("The recipe changes no o_proj, so there is no adapter to write.")
    return layers


_USE = (
    "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
    'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "this folder")\n```'
)
_SHIFT = (
    "\n\nThe edit needs a shift, held by `lora_bias`: peft applies it to any model, but merges it only where `o_proj` "
    "has a bias of its own, and some servers refuse it."
)


def _biased(model: PreTrainedModel) -> PreTrainedModel:
    """The model once more, sharing every tensor, in which each `o_proj` has a bias to draft a shift in."""
    twin = twin_of(model)
    for layer in layers_with_heads(twin):
        if o_proj_bias(twin, layer) is None:
            o_proj = o_proj_of(twin, layer)
            weight = output_first(row_at(twin, layer), path_of_o_proj(twin, layer), o_proj.get_parameter("weight"))
            o_proj.register_parameter("bias", nn.Parameter(weight.new_zeros(len(weight))))
    return twin


def _factored(
    delta: Float[Tensor, "d_model d_in"], norm: float
) -> tuple[Float[Tensor, "d_model rank"], Float[Tensor, "rank d_in"]]:
    """delta = B A with orthonormal columns of B, without what rounding alone can make. Most columns never change."""
    used = delta.any(dim=0)
    u, s, vh = torch.linalg.svd(delta[:, used], full_matrices=False)
    rank = int((s > torch.finfo(torch.float32).eps * norm).sum())
    a = delta.new_zeros(rank, delta.shape[1])
    a[:, used] = s[:rank, None] * vh[:rank]
    return u[:, :rank], a


def _write_adapter(model: PreTrainedModel, layers: Mapping[int, LowRank], stage: Path) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`: one rank for all, which zeros fill up."""
    from peft import LoraConfig

    rank = max(1, *(change.rank for change in layers.values()))
    shifted = any(bool(change.shift.any()) for change in layers.values())
    row, origin = architecture_of(model), origin_of(model)
    config = LoraConfig(
        base_model_name_or_path=origin.name,
        revision=origin.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        lora_bias=shifted,
        target_modules=[_path(model, layer) for layer in layers],
        fan_in_fan_out=row.o_proj in row.input_first,
    )
    written: dict[str, Any] = cast("Any", config).to_dict()
    words = {key: sorted(value) if isinstance(value, set) else value for key, value in written.items()}
    (stage / "adapter_config.json").write_text(json.dumps(words, indent=2, sort_keys=True), encoding="utf-8")
    tensors = {}
    for layer, change in layers.items():
        name, more = f"base_model.model.{_path(model, layer)}", rank - change.rank
        tensors[f"{name}.lora_A.weight"] = nn.functional.pad(change.a, (0, 0, 0, more))
        tensors[f"{name}.lora_B.weight"] = nn.functional.pad(change.b, (0, more))
        if shifted:
            tensors[f"{name}.lora_B.bias"] = change.shift
    write_tensors(stage / "adapter_model.safetensors", tensors)
    prove_written(stage, {name: Meant.of(tensor) for name, tensor in tensors.items()}, stem="adapter_model")


def _path(model: PreTrainedModel, layer: int) -> str:
    return path_of(model, Site(layer, "z"))


@torch.no_grad()
def _changes(model: PreTrainedModel, layers: Mapping[int, LowRank]) -> Difference:
    found = []
    for layer, change in layers.items():
        name, weight = _path(model, layer), o_proj_of(model, layer).get_parameter("weight")
        bias = o_proj_bias(model, layer)
        if change.rank:
            relative = float(change.a.norm() / weight.float().norm())  # B is orthonormal
            found.append(
                TensorDifference(f"{name}.weight", tuple(weight.shape), "changed", relative, change.rank),
            )
        if change.shift.any():
            status, size = ("only in B", float("nan")) if bias is None else ("changed", float(bias.float().norm()))
            relative = float(change.shift.norm()) / max(size, 1e-30)
            found.append(TensorDifference(f"{name}.bias", tuple(change.shift.shape), status, relative, 1))
    return Difference(tuple(sorted(found, key=lambda t: t.name)), len(list(model.parameters())))


def _write_card(path: Path, model: PreTrainedModel, recipe: Recipe, sections: Sequence[Section]) -> None:
    write_card(path, origin_of(model).name, recipe.method, sections)
    card = path.read_text(encoding="utf-8").replace("library_name: transformers", "library_name: peft", 1)
    path.write_text(card.replace("An ordinary checkpoint: it", "An ordinary LoRA adapter: it", 1), encoding="utf-8")
