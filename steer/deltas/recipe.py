"""An edit recipe as a weight delta: what folding it changes, tensor by tensor, to be added, dialled and stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.tables import Brief
from steer.checkpoints.checkpoint import as_rows
from steer.checkpoints.conversions import on_disk
from steer.deltas.delta import WeightDelta
from steer.folding._fold import drafted
from steer.recipes.recipe import Recipe


@dataclass(frozen=True, eq=False, repr=False)
class RecipeDelta(Brief):
    """A source of the tensors that a recipe changes, held in float64. Token ids and config are the target's own.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Ablate, Recipe
    >>> from steer.deltas import recipe_delta
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Ablate(Site(2, "result", 3), torch.ones(96))], method="ablation")
    >>> delta = recipe_delta(model, recipe)
    >>> delta.terms[0].source.words["recipe"], delta.names
    ('ablation', ('model.layers.2.self_attn.o_proj.weight',))
    """

    recipe: Recipe
    tensors: Mapping[str, Tensor]

    @property
    def names(self) -> Sequence[str]:
        return tuple(self.tensors)

    @property
    def vocabulary(self) -> None: ...

    @property
    def tied(self) -> None: ...

    @property
    def config(self) -> Mapping[str, Any]:
        return {}

    @property
    def words(self) -> dict[str, Any]:
        return {"recipe": self.recipe.method, "model": self.recipe.model}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def block(self, name: str, rows: slice) -> Float[Tensor, "rows width"]:
        return as_rows(self.tensors[name])[rows]


@torch.no_grad()
def recipe_delta(model: PreTrainedModel, recipe: Recipe) -> WeightDelta:
    """What `steer.fold` changes in this model: added with strength 1 it is the folded model, number for number.

    An edit is linear in the weights, so that a strength between 0 and 1 is the edit in part. Raises NotFoldable where
    no change of weights equals the recipe, or where it takes a bias that the model does not have, ValueError for
    another model's recipe.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Ablate, Recipe, folded
    >>> from steer.deltas import recipe_delta
    >>> model, name = load("organism"), "model.layers.2.self_attn.o_proj.weight"
    >>> recipe = Recipe.of(model, [Ablate(Site(2, "result", 3), torch.ones(96))])
    >>> after = model.get_parameter(name) + recipe_delta(model, recipe).tensor(name)
    >>> torch.allclose(after, folded(model, recipe).get_parameter(name))
    True
    """
    recipe.check(model)
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    tensors: dict[str, Tensor] = {}
    for parameter, after in drafted(model, recipe, rounded=False).copies.items():
        change = after.double() - parameter.double()
        tensors |= on_disk(model, names[id(parameter)], change)
    return WeightDelta.of(RecipeDelta(recipe, tensors))
