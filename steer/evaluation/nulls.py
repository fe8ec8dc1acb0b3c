"""The controls of a recipe: the same steps along random directions of the same norms."""

from dataclasses import replace

import torch
from torch import Tensor

from steer.recipes.recipe import Recipe, Step


def random_recipe(recipe: Recipe, *, seed: int) -> Recipe:
    """Each vector is replaced by a random direction of its norm; equal vectors by one. Scopes and numbers stay.

    Raises ValueError where no step has a vector: there is nothing to draw.
    """
    # Far from the seeds that vectors are drawn with elsewhere: a null of a random vector must not be that vector.
    generator, drawn = torch.Generator().manual_seed(1_000_003 + seed), list[tuple[Tensor, Tensor]]()

    def null(vector: Tensor) -> Tensor:
        for old, new in drawn:
            if torch.equal(old, vector):
                return new
        noise = torch.randn(vector.shape, generator=generator)
        drawn.append((vector, (noise * (vector.float().norm() / noise.norm())).to(vector)))
        return drawn[-1][1]

    steps = [
        step
        if step.intervention.vector is None
        else Step(replace(step.intervention, vector=null(step.intervention.vector)), step.scope)  # type: ignore[type-var]
        for step in recipe.steps
    ]
    if not drawn:
        raise ValueError("No step of the recipe has a vector, so that it has no random direction to be compared with.")
    return replace(recipe, steps=tuple(steps), method=f"{recipe.method}, random directions, seed {seed}")
