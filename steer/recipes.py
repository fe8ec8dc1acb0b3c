"""A recipe: interventions with their scopes, the file that travels, and its application at run time."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from transformers import PreTrainedModel

from probes.architectures import head_matrices, o_proj_of, tap_of
from probes.files import check_keys, read_tensors, read_yaml, staged_folder, write_tensors
from probes.hooks import attached, watched
from probes.models import delimiters_of, identity_of
from probes.sites import Site
from probes.tables import Table
from steer.interventions import KINDS, Intervention, placed
from steer.scopes import SCOPES, Clock, Scope

FORMAT = "thinksteer recipe 1"
_IDENTITY = ("name", "revision", "model_type", "n_layers", "n_heads", "d_model", "fingerprint")


@dataclass(frozen=True)
class Step:
    """One intervention, and the tokens it touches."""

    intervention: Intervention
    scope: Scope = "all"


@dataclass(frozen=True, eq=False)
class Recipe:
    """Steps in order. `model` is the identity of the model it was made on (`probes.models.identity_of`)."""

    steps: tuple[Step, ...]
    model: dict[str, Any]
    method: str = ""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        interventions: Sequence[Intervention],
        *,
        scope: Scope = "all",
        method: str = "",
    ) -> "Recipe":
        return cls(tuple(Step(x, scope) for x in interventions), identity_of(model), method)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the recipe was made on another model, or a vector does not fit its site."""
        here = identity_of(model)
        different = [key for key in _IDENTITY[2:] if self.model[key] != here[key]]
        if different:
            facts = ", ".join(f"{key} {self.model[key]} there, {here[key]} here" for key in different)
            raise ValueError(
                f"This recipe was made for the model {self.model['name']!r}, not for {here['name']!r}: {facts}. "
                "Derive it again on this model."
            )
        for step in self.steps:
            _check_vector(model, step.intervention)

    def save(self, folder: Path) -> None:
        """`recipe.yaml` (words) and `recipe.safetensors` (tensors), in a new folder."""
        with staged_folder(Path(folder)) as stage:
            self.write(stage)

    def write(self, folder: Path) -> None:
        words: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for i, step in enumerate(self.steps):
            words.append({"kind": step.intervention.kind, "scope": step.scope, **_numbers(step.intervention)})
            tensors[f"{i}.vector"] = step.intervention.vector
        whole = {"format": FORMAT, "method": self.method, "model": self.model, "steps": words}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
        write_tensors(folder / "recipe.safetensors", tensors)

    @classmethod
    def load(cls, folder: Path) -> "Recipe":
        """Raises ValueError where a key is unknown or missing, or the tensors are not whole."""
        path = Path(folder) / "recipe.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no recipe.yaml: it is not a recipe.")
        words = read_yaml(path)
        check_keys(words, ("format", "method", "model", "steps"), str(path))
        if words["format"] != FORMAT:
            raise ValueError(f"{path} has format {words['format']!r}, and this version reads {FORMAT!r}.")
        check_keys(words["model"], _IDENTITY, f"model in {path}")
        tensors, _ = read_tensors(path.with_suffix(".safetensors"))
        check_keys(
            tensors,
            [f"{i}.vector" for i in range(len(words["steps"]))],
            f"{path.with_suffix('.safetensors')}",
        )
        steps = [_read_step(i, step, tensors[f"{i}.vector"], path) for i, step in enumerate(words["steps"])]
        return cls(tuple(steps), words["model"], words["method"])

    def table(self) -> Table:
        rows = [
            (i, s.intervention.kind, str(s.intervention.site), s.scope, float(s.intervention.strength))
            for i, s in enumerate(self.steps)
        ]
        title = f"{self.method or 'Recipe'}, made on {self.model['name']}"
        return Table(("step", "kind", "site", "scope", "strength"), tuple(rows), title)

    def to_frame(self):
        return self.table().to_frame()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@contextmanager
def applied(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """While open, the model runs with the recipe; `model.generate` needs to know nothing of it.

    Raises ValueError where the recipe was made on another model.
    """
    recipe.check(model)
    clock: Clock | None = None
    if any(step.scope != "all" for step in recipe.steps):
        clock = Clock(delimiters_of(model))
    with ExitStack() as stack:
        if clock is not None:
            stack.enter_context(watched(model, clock.advance))
        for site, steps in groupby(sorted(recipe.steps, key=_place), key=_at):
            device = o_proj_of(model, site.layer).get_parameter("weight").device
            edits = [Step(placed(step.intervention, device), step.scope) for step in steps]
            stack.enter_context(attached(model, site, partial(_apply, steps=edits, clock=clock)))
        yield


def _apply(x: Tensor, steps: list[Step], clock: Clock | None) -> Tensor:
    for step in steps:
        new = step.intervention(x)
        x = new if step.scope == "all" or clock is None else new.where(clock.mask(step.scope)[..., None], x)
    return x


def _at(step: Step) -> Site:
    return step.intervention.site


def _place(step: Step) -> tuple:
    site = _at(step)
    return site.layer, site.name, -1 if site.head is None else site.head


def _numbers(intervention: Intervention) -> dict[str, Any]:
    """Every field but the tensor, as YAML holds it: infinite bounds are null."""
    values = {f.name: getattr(intervention, f.name) for f in fields(intervention) if f.name != "vector"}  # type: ignore[arg-type]
    values["site"] = str(values["site"])
    return {key: None if isinstance(v, float) and math.isinf(v) else v for key, v in values.items()}


def _read_step(i: int, words: dict[str, Any], vector: Tensor, path: Path) -> Step:
    where = f"Step {i} in {path}"
    kind = KINDS.get(str(words.get("kind")))
    if kind is None:
        raise ValueError(f"{where} has kind {words.get('kind')!r}. Known: {', '.join(KINDS)}.")
    names = [f.name for f in fields(kind) if f.name != "vector"]
    check_keys(words, ("kind", "scope", *names), where)
    if words["scope"] not in SCOPES:
        raise ValueError(f"{where} has scope {words['scope']!r}. Known: {', '.join(SCOPES)}.")
    if not isinstance(words["site"], str):
        raise ValueError(f"{where} has site {words['site']!r}, which is no text.")
    values: dict[str, Any] = {"site": Site.parse(words["site"])}
    for name in names[1:]:
        if words[name] is None and name in ("low", "high"):
            continue  # infinite
        if isinstance(words[name], bool) or not isinstance(words[name], int | float):
            raise ValueError(f"{where} has {name} {words[name]!r}, which is no number.")
        values[name] = float(words[name])
    return Step(kind(vector=vector, **values), words["scope"])


def _check_vector(model: PreTrainedModel, intervention: Intervention) -> None:
    """A vector of another width would be stretched without a word; one of zeros has no direction."""
    site, vector = intervention.site, intervention.vector
    tap_of(model, site)
    d_model, heads, d_head = head_matrices(model, site.layer).shape
    width = d_model if site.name != "z" else d_head if site.head is not None else heads * d_head
    if len(vector) != width:
        raise ValueError(f"The vector for {site} has {len(vector)} entries, but the activation there has {width}.")
    if intervention.kind != "add" and not vector.any():
        raise ValueError(f"The vector for {site} is zero, so there is no direction to project on.")
