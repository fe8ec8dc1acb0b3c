"""A completion as a page: alone, or with another beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from transformers import PreTrainedModel

from probes.files import staged_file
from probes.generation.completions import Completion
from probes.tables import Brief
from probes.thinking.rules import Rules
from steer.recipes.recipe import Recipe
from steer.view.listening import Reading, read_tracks
from steer.view.page import page
from steer.view.readings import confidence
from steer.view.side import Side, Source
from steer.view.track import Track

HEIGHT = 640  # pixels of the frame in a notebook


@dataclass(frozen=True, eq=False, repr=False)
class View(Brief):
    """One chain, or two side by side, to be looked at: Jupyter shows it, and `save` writes it as one HTML file.

    >>> from probes import generate, load
    >>> from steer.view import view
    >>> model = load("organism")
    >>> (completion,) = generate(model, ["a 3 b +4 c *7"])
    >>> shown = view(completion, model=model)
    >>> path = shown.save("chain.html")
    >>> path.read_text(encoding="utf-8") == shown.html
    True
    """

    title: str
    sides: tuple[Side, ...]

    @property
    def html(self) -> str:
        """The whole file, which fetches nothing."""
        return page(self.title, self.sides)

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all; one of that name is replaced."""
        with staged_file(Path(path)) as stage:
            stage.write_text(self.html, encoding="utf-8")
        return Path(path)

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{escape(self.html)}" sandbox="allow-scripts" title="{escape(self.title)}" '
            f'style="width:100%;height:{HEIGHT}px;border:1px solid #8686864d;border-radius:6px"></iframe>'
        )


def view(
    completion: Completion,
    *,
    model: Source | None = None,
    tracks: Sequence[Track | Reading] | None = None,
    recipe: Recipe | None = None,
    beside: "Completion | View | None" = None,
    rules: str | Rules | None = None,
    name: str = "",
) -> View:
    """A completion token by token, its thoughts as bands, and tracks on the same axis of tokens.

    `tracks` are numbers of yours, or readings of the model such as `projections`, all made in one pass; confidence if
    left out. Under a `recipe` they are read of the steered model, and what the recipe touches is a track. Another
    completion `beside` it is read in the same way; a view of its own has tracks, and a recipe, of its own. `rules` cut
    the thinking into thoughts (`probes.thinking.segments`), `name` is the heading of this side. Without a `model` there
    are words in place of tokens; with a tokenizer in its place, tokens and no readings. Raises ValueError for a reading
    without a model, a track that does not fit, and a view beside that has two sides.

    >>> from probes import Site, generate, load
    >>> from steer import Recipe, Scale, applied
    >>> from steer.view import confidence, trajectory, view
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Scale(Site(2, "mlp_out"), 0.5)], scope="thinking")
    >>> (plain,) = generate(model, ["a 3 b +4 c *7"])
    >>> with applied(model, recipe):
    ...     (steered,) = generate(model, ["a 3 b +4 c *7"])
    >>> other = view(steered, model=model, recipe=recipe)
    >>> shown = view(plain, model=model, tracks=[confidence(), trajectory(segment=3)], beside=other)
    >>> [(side.name, len(side.tracks)) for side in shown.sides]
    [('plain', 4), ('steered', 3)]
    """
    if isinstance(beside, View) and len(beside.sides) > 1:
        raise ValueError("The view beside it has two sides already: give one of a single completion.")
    heading = name or ("plain" if recipe is None else "steered")
    sides = [_side(completion, model, tracks, recipe, rules, heading)]
    if isinstance(beside, View):
        sides += beside.sides
    elif beside is not None:
        sides.append(_side(beside, model, tracks, recipe, rules, "beside"))
    return View(f"Completion {completion.id}, sample {completion.sample}", tuple(sides))


def _side(
    completion: Completion,
    source: Source | None,
    tracks: Sequence[Track | Reading] | None,
    recipe: Recipe | None,
    rules: str | Rules | None,
    name: str,
) -> Side:
    reader = source if isinstance(source, PreTrainedModel) else None
    wanted: Sequence[Track | Reading] = ([] if reader is None else [confidence()]) if tracks is None else tracks
    readings = [one for one in wanted if not isinstance(one, Track)]
    if reader is None and (readings or recipe is not None):
        raise ValueError("Readings and recipes need the model that wrote the completion: name it, model=.")
    given = [one for one in wanted if isinstance(one, Track)]
    if reader is not None and (readings or recipe is not None):
        given += read_tracks(reader, completion, readings, recipe=recipe)
    return Side.of(completion, source, given, rules=rules, name=name)
