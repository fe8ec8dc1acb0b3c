"""A recipe: interventions with their scopes, and the file that travels. `steer.runtime.applied` runs it."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from transformers import PreTrainedModel

from probes.files import check_keys, read_tensors, read_yaml, staged_folder, write_tensors
from probes.model.architectures import tap_of, width_of
from probes.model.loading import identity_of
from probes.model.quantised import is_quantised
from probes.model.sites import Site
from probes.tables import Table
from steer.interventions.activation import KINDS, Intervention
from steer.interventions.routing import Forbid, Force, Reinforce, RoutingEdit, check_expert
from steer.recipes.scope import Scope

FORMAT = "thinksteer recipe 1"
_ROUTING: dict[str, type[Reinforce] | type[Force] | type[Forbid]] = {k.kind: k for k in (Reinforce, Force, Forbid)}
_IDENTITY = ("name", "revision", "model_type", "n_layers", "n_heads", "d_model", "fingerprint")


@dataclass(frozen=True)
class Step:
    """One intervention, and the tokens it touches."""

    intervention: Intervention | RoutingEdit
    scope: Scope = Scope()


@dataclass(frozen=True, eq=False)
class Recipe:
    """Steps in order. `model` is the identity of the model it was made on (`probes.model.loading.identity_of`)."""

    steps: tuple[Step, ...]
    model: dict[str, Any]
    method: str = ""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        interventions: Sequence[Intervention | RoutingEdit],
        *,
        scope: str | Scope = "all",
        method: str = "",
    ) -> "Recipe":
        return cls(tuple(Step(x, Scope.of(scope)) for x in interventions), identity_of(model), method)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the recipe was made on another model, or a vector does not fit its site."""
        here = identity_of(model)
        telling = _IDENTITY[2:-1] if is_quantised(model) else _IDENTITY[2:]  # what is packed has no fingerprint
        different = [key for key in telling if self.model[key] != here[key]]
        if different:
            facts = ", ".join(f"{key} {self.model[key]} there, {here[key]} here" for key in different)
            raise ValueError(
                f"This recipe was made for the model {self.model['name']!r}, not for {here['name']!r}: {facts}. "
                "Derive it again on this model."
            )
        for step in self.steps:
            if isinstance(step.intervention, RoutingEdit):
                check_expert(model, step.intervention.site)
            else:
                _check_vector(model, step.intervention.site, step.intervention.vector, step.intervention.kind)
            for part in (step.scope.condition, step.scope.controller):
                if part is not None and part.site is not None:
                    _check_vector(model, part.site, part.vector, "projection")

    def save(self, folder: Path) -> None:
        """`recipe.yaml` (words) and `recipe.safetensors` (tensors), in a new folder."""
        with staged_folder(Path(folder)) as stage:
            self.write(stage)

    def write(self, folder: Path) -> None:
        words, tensors = self._parts()
        (folder / "recipe.yaml").write_text(words)
        write_tensors(folder / "recipe.safetensors", tensors)

    def fingerprint(self) -> str:
        """A checksum of all that the recipe's files hold."""
        words, tensors = self._parts()
        digest = hashlib.sha256(words.encode())
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _parts(self) -> tuple[str, dict[str, Tensor]]:
        words: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for i, step in enumerate(self.steps):
            scope, parts = step.scope.words()
            words.append({"kind": step.intervention.kind, "scope": scope, **_numbers(step.intervention)})
            tensors |= {f"{i}.{name}": tensor for name, tensor in parts.items()}
            if step.intervention.vector is not None:
                tensors[f"{i}.vector"] = step.intervention.vector
        whole = {"format": FORMAT, "method": self.method, "model": self.model, "steps": words}
        return yaml.safe_dump(whole, sort_keys=False), tensors

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
        steps = tuple(_read_step(i, step, tensors, path) for i, step in enumerate(words["steps"]))
        recipe = cls(steps, words["model"], words["method"])
        check_keys(tensors, recipe._tensors(), f"{path.with_suffix('.safetensors')}")
        return recipe

    def _tensors(self) -> list[str]:
        names = [f"{i}.{name}" for i, step in enumerate(self.steps) for name in step.scope.words()[1]]
        return [*names, *(f"{i}.vector" for i, step in enumerate(self.steps) if step.intervention.vector is not None)]

    def table(self) -> Table:
        rows = [
            (i, s.intervention.kind, str(s.intervention.site), str(s.scope), float(s.intervention.strength))
            for i, s in enumerate(self.steps)
        ]
        title = f"{self.method or 'Recipe'}, made on {self.model['name']}"
        return Table(("step", "kind", "site", "scope", "strength"), tuple(rows), title)

    def to_frame(self):
        return self.table().to_frame()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _numbers(intervention: Intervention | RoutingEdit) -> dict[str, Any]:
    """Every field but the tensor, as YAML holds it: infinite bounds are null."""
    values = {f.name: getattr(intervention, f.name) for f in fields(intervention) if f.name != "vector"}  # type: ignore[arg-type]
    values["site"] = str(values["site"])
    return {key: None if isinstance(v, float) and math.isinf(v) else v for key, v in values.items()}


def _read_step(i: int, words: dict[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Step:
    where = f"Step {i} in {path}"
    known: dict[str, Any] = {**KINDS, **_ROUTING}
    kind = known.get(str(words.get("kind")))
    if kind is None:
        raise ValueError(f"{where} has kind {words.get('kind')!r}. Known: {', '.join(known)}.")
    names = [f.name for f in fields(kind) if f.name != "vector"]
    check_keys(words, ("kind", "scope", *names), where)
    own = {name: tensors.get(f"{i}.{name}") for name in ("vector", "condition", "controller")}
    scope = Scope.read(words["scope"], own, where)
    if not isinstance(words["site"], str):
        raise ValueError(f"{where} has site {words['site']!r}, which is no text.")
    values: dict[str, Any] = {"site": Site.parse(words["site"])}
    for name in names[1:]:
        if words[name] is None and name in ("low", "high"):
            continue  # infinite
        if name == "renormalise" and isinstance(words[name], bool):
            values[name] = words[name]
            continue
        if isinstance(words[name], bool) or not isinstance(words[name], int | float):
            raise ValueError(f"{where} has {name} {words[name]!r}, which is no number.")
        values[name] = float(words[name])
    if any(f.name == "vector" for f in fields(kind)):
        if own["vector"] is None:
            raise ValueError(f"{path.with_suffix('.safetensors')} lacks keys: {i}.vector.")
        values["vector"] = own["vector"]
    return Step(kind(**values), scope)


def _check_vector(model: PreTrainedModel, site: Site, vector: Tensor | None, kind: str) -> None:
    """A vector of another width would be stretched without a word; one of zeros has no direction."""
    tap_of(model, site)
    if vector is None:
        return
    width = width_of(model, site)
    if len(vector) != width:
        raise ValueError(f"The vector for {site} has {len(vector)} entries, but the activation there has {width}.")
    if kind != "add" and not vector.any():
        raise ValueError(f"The vector for {site} is zero, so there is no direction to project on.")
