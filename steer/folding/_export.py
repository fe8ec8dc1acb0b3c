"""Export an edited model as an ordinary checkpoint, with a card that says what was done to it."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from probes.files import staged_folder
from probes.model.architectures import head_matrices
from probes.model.loading import folder_of, origin_of, tokenizer_of
from probes.model.sites import Site
from probes.tables import Table
from steer.checkpoints._diff import Difference, diff
from steer.checkpoints.card import Section, write_card
from steer.checkpoints.conversions import was_converted
from steer.checkpoints.hub import check_repository, push
from steer.checkpoints.writing import write_model
from steer.folding._fold import folded
from steer.folding.card import recipe_sections
from steer.interventions.activation import Ablate, Add
from steer.recipes.recipe import Recipe


def export(
    model: PreTrainedModel,
    recipe: Recipe,
    folder: str | Path,
    *,
    sections: Sequence[Section] = (),
    extras: Mapping[str, str] | None = None,
    push_to: str | None = None,
    private: bool = True,
) -> Difference:
    """Write the model with the recipe folded in to a new folder that plain transformers loads.

    Beside weights, config and tokenizer it holds the recipe (`recipe/`) and a card (`README.md`) with the recipe, the
    tensors that changed, and `sections`. `extras` are further text files, by name.
    The folder appears under its name only when it is whole; `push_to` names a
    repository of the Hugging Face hub that it is then uploaded to. Raises NotFoldable for a recipe that no weights
    equal, FileExistsError where the folder exists, ValueError for another model's recipe.

    >>> from pathlib import Path
    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Ablate, Recipe, export
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Ablate(Site(1, "result", head=2), torch.ones(96))])
    >>> changes = export(model, recipe, "edited")
    >>> [tensor.name for tensor in changes.tensors], (Path("edited") / "recipe" / "recipe.yaml").is_file()
    (['model.layers.1.self_attn.o_proj.weight'], True)
    """
    check_repository(push_to)
    with staged_folder(Path(folder)) as stage:
        twin = folded(model, recipe)
        write_model(twin, stage)
        tokenizer_of(model).save_pretrained(stage)
        (stage / "recipe").mkdir()
        recipe.write(stage / "recipe")
        changes = _changes(model, stage)
        changed = [
            *recipe_sections(recipe),
            Section("Tensors that differ", f"Against {origin_of(model).name}.", changes.table()),
        ]
        if (projected := projections(model, twin, recipe)).rows:
            changed.append(Section("Projection of the edited heads", _PROJECTION, projected))
        write_card(stage / "README.md", origin_of(model).name, recipe.method, [*sections, *changed])
        for name, text in (extras or {}).items():
            (stage / name).write_text(text, encoding="utf-8")
    if push_to is not None:
        push(folder, push_to, private=private)
    return changes


_PROJECTION = (
    "‖v̂ᵀW‖ over each edited head's columns of `o_proj`: before, after the edit in float32, and as stored, "
    "rounded to the checkpoint's dtype."
)


@torch.no_grad()
def projections(model: PreTrainedModel, twin: PreTrainedModel, recipe: Recipe) -> Table:
    """‖v̂ᵀW_h‖ of each head that the recipe edits at `result`, before, after in float32, and after rounding."""
    rows = []
    for step in recipe.steps:
        site: Site = step.intervention.site
        vector = step.intervention.vector
        if site.name != "result" or not isinstance(step.intervention, Add | Ablate) or vector is None:
            continue
        affine = step.intervention.affine(len(vector))
        before = head_matrices(model, site.layer)[:, site.head].float()
        unit = (vector / vector.norm()).float().to(before.device)
        exact = before + affine.up.T.to(before.device) @ (affine.down.T.to(before.device) @ before)
        after = head_matrices(twin, site.layer)[:, site.head].float()
        rows.append((f"L{site.layer}H{site.head}", *(float((unit @ w).norm()) for w in (before, exact, after))))
    return Table(("head", "before", "after", "stored"), tuple(rows))


def _changes(model: PreTrainedModel, stage: Path) -> Difference:
    """Against the folder the model was read from; against a passing copy where it holds no plain checkpoint of it."""
    source = folder_of(model)
    if source is not None and any(source.glob("model*.safetensors")) and not was_converted(model):
        return diff(source, stage)
    with tempfile.TemporaryDirectory(dir=stage, prefix=".plain.") as plain:  # goes with the stage, whatever happens
        write_model(model, Path(plain))
        return diff(plain, stage)
