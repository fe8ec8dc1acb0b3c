"""What a card says of a recipe: its steps, and where their directions came from."""

from steer.checkpoints.card import Section
from steer.recipes.recipe import Recipe


def recipe_sections(recipe: Recipe) -> list[Section]:
    """The steps, and the births of the directions where there are any."""
    steps = Section("Recipe", "Also in `recipe/`, as a file that the run time takes.", recipe.table())
    if not recipe.births:
        return [steps]
    words = "The model, the data and the estimator behind each direction; of a sum, those of its parts."
    return [steps, Section("Births", words, recipe.births_table())]
