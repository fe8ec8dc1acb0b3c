"""A recipe: interventions with their scopes, and the file that travels. `steer.runtime.applied` runs it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from transformers import PreTrainedModel

from probes.directions.provenance import Provenance, births_table
from probes.fields import keys_of
from probes.files import check_keys, inside, reading, staged_folder
from probes.model.loading import identity_of
from probes.model.quantised import is_quantised
from probes.tables import Brief, Shown, Table
from probes.tensors import read_tensors, write_tensors
from probes.texts import read_yaml
from steer.interventions.kinds import KINDS, Change
from steer.recipes.fields import fields_of, names_of, read, tensor_names, tensors_of
from steer.recipes.scope import Scope

FORMAT = "thinksteer recipe 2"
_WITHOUT_BIRTHS = "thinksteer recipe 1"
_IDENTITY = ("name", "revision", "model_type", "n_layers", "n_heads", "d_model", "fingerprint")


@dataclass(frozen=True, repr=False)
class Step(Brief):
    """One intervention, and the tokens it touches.

    >>> import torch
    >>> from probes import Site
    >>> from steer import Add, Scope, Step
    >>> print(Step(Add(Site(2, "resid_post"), torch.ones(96)), Scope("thinking")).scope)
    thinking
    """

    intervention: Change
    scope: Scope = Scope()


@dataclass(frozen=True, eq=False, repr=False)
class Recipe(Shown):
    """Steps in order. `model` is the identity of the model it was made on (`probes.model.loading.identity_of`).

    >>> import torch
    >>> from pathlib import Path
    >>> from probes import Site, load
    >>> from steer import Add, Recipe
    >>> recipe = Recipe.of(load("organism"), [Add(Site(2, "resid_post"), torch.ones(96), 0.5)], scope="thinking")
    >>> recipe.save(Path("recipe"))
    >>> Recipe.load(Path("recipe")).table().rows
    ((0, 'add', 'L2.resid_post', 'thinking', 0.5),)
    """

    steps: tuple[Step, ...]
    model: dict[str, Any]
    method: str = ""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        interventions: Sequence[Change],
        *,
        scope: str | Scope = "all",
        method: str = "",
    ) -> "Recipe":
        """Interventions on this model, all in one scope. Raises ValueError for a scope that is unknown."""
        return cls(tuple(Step(x, Scope.of(scope)) for x in interventions), identity_of(model), method)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the recipe was made on another model, or a vector does not fit its site."""
        here = identity_of(model)
        different = [key for key in _IDENTITY[2:] if self.model[key] != here[key]]
        if "fingerprint" in different and is_quantised(model):  # what is packed has none to compare
            different.remove("fingerprint")
        if different:
            facts = ", ".join(f"{key} {self.model[key]} there, {here[key]} here" for key in different)
            raise ValueError(
                f"This recipe was made for the model {self.model['name']!r}, not for {here['name']!r}: {facts}. "
                "Derive it again on this model."
            )
        for step in self.steps:
            step.intervention.check(model)
            step.scope.check(model)

    @property
    def births(self) -> tuple[Provenance, ...]:
        """Where the directions came from, each once, in the order of the steps."""
        found: list[Provenance] = []
        for step in self.steps:
            found += [birth for birth in _births_of(step) if birth is not None and birth not in found]
        return tuple(found)

    def births_table(self) -> Table:
        """The birth of each direction, and the steps that use it."""
        uses = [[i for i, step in enumerate(self.steps) if birth in _births_of(step)] for birth in self.births]
        names = [f"step {rows[0]}" if len(rows) == 1 else f"steps {', '.join(map(str, rows))}" for rows in uses]
        return births_table(zip(names, self.births, strict=True))

    def save(self, folder: Path) -> None:
        """`recipe.yaml` (words) and `recipe.safetensors` (tensors), in a new folder."""
        with staged_folder(Path(folder)) as stage:
            self.write(stage)

    def write(self, folder: Path) -> None:
        """The two files of `save`, in a folder that is there."""
        words, tensors = self._parts()
        (folder / "recipe.yaml").write_text(words, encoding="utf-8")
        write_tensors(folder / "recipe.safetensors", tensors)

    def fingerprint(self) -> str:
        """A checksum of all that the recipe's files hold."""
        words, tensors = self._parts()
        digest = hashlib.sha256(words.encode())
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _parts(self) -> tuple[str, dict[str, Tensor]]:
        steps: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        births = self.births
        for i, step in enumerate(self.steps):
            scope, parts = step.scope.to_dict()
            named = zip(_BIRTHS, _births_of(step), strict=True)
            own = {name: births.index(birth) for name, birth in named if birth is not None}
            steps.append({"kind": step.intervention.kind, "scope": scope, **fields_of(step.intervention), **own})
            tensors |= {f"{i}.{name}": tensor for name, tensor in parts.items()}
            tensors |= {f"{i}.{name}": tensor for name, tensor in tensors_of(step.intervention).items()}
        whole = {
            "format": FORMAT,
            "method": self.method,
            "model": self.model,
            "births": [birth.to_dict() for birth in births],
            "steps": steps,
        }
        return yaml.dump(whole, Dumper=_Dumper, sort_keys=False), tensors

    @classmethod
    def load(cls, folder: Path) -> "Recipe":
        """Raises ValueError where a key is unknown or missing, or the tensors are not whole."""
        path = Path(folder) / "recipe.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no recipe.yaml: it is not a recipe.")
        with reading(folder, "recipe"):
            return cls._read(path)

    @classmethod
    def _read(cls, path: Path) -> "Recipe":
        words = read_yaml(inside(path.parent, path.name), "recipe")
        if words.get("format") == _WITHOUT_BIRTHS:
            words = {"births": [], **words}
        check_keys(words, ("format", "method", "model", "births", "steps"), str(path))
        if words["format"] not in (FORMAT, _WITHOUT_BIRTHS):
            raise ValueError(f"{path} has format {words['format']!r}, and this version reads {FORMAT!r}.")
        check_keys(keys_of(words["model"], f"model in {path}"), _IDENTITY, f"model in {path}")
        if not isinstance(words["method"], str):
            raise ValueError(f"{path} has method {words['method']!r}, which is no text.")
        for key in ("births", "steps"):
            if not isinstance(words[key], list):
                raise ValueError(f"{path} has {key} {words[key]!r}, which is no list.")
        births = [Provenance.from_dict(b, f"Birth {i} in {path}") for i, b in enumerate(words["births"])]
        tensors, _ = read_tensors(inside(path.parent, path.with_suffix(".safetensors").name))
        steps = tuple(_read_step(i, step, tensors, births, path) for i, step in enumerate(words["steps"]))
        recipe = cls(steps, words["model"], words["method"])
        check_keys(tensors, recipe._tensors(), f"{path.with_suffix('.safetensors')}")
        return recipe

    def _tensors(self) -> list[str]:
        names = [f"{i}.{name}" for i, step in enumerate(self.steps) for name in step.scope.to_dict()[1]]
        return [*names, *(f"{i}.{name}" for i, step in enumerate(self.steps) for name in tensors_of(step.intervention))]

    def table(self) -> Table:
        """A row for each step."""
        rows = [
            (i, s.intervention.kind, str(s.intervention.site), str(s.scope), float(s.intervention.strength))
            for i, s in enumerate(self.steps)
        ]
        title = f"{self.method or 'Recipe'}, made on {self.model['name']}"
        return Table(("step", "kind", "site", "scope", "strength"), tuple(rows), title)


class _Dumper(yaml.SafeDumper):
    """Writes what is used twice twice: an anchor is a riddle to a reader."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


_BIRTHS = ("birth", "condition_birth")  # the keys of a step that number births


def _births_of(step: Step) -> tuple[Provenance | None, Provenance | None]:
    condition = step.scope.condition
    return step.intervention.birth, None if condition is None else condition.birth


def _read_step(i: int, words: Any, tensors: Mapping[str, Tensor], births: Sequence[Provenance], path: Path) -> Step:
    where = f"Step {i} in {path}"
    words = dict(keys_of(words, where))
    kind = KINDS.get(str(words.get("kind")))
    if kind is None:
        raise ValueError(f"{where} has kind {words.get('kind')!r}. Known: {', '.join(KINDS)}.")
    names = names_of(kind)
    check_keys({key: x for key, x in words.items() if key not in _BIRTHS}, ("kind", "scope", *names), where)
    own = {name: tensors.get(f"{i}.{name}") for name in ("condition", "controller")}
    birth, condition_birth = (_birth(births, words.get(name), where) for name in _BIRTHS)
    scope = Scope.from_dict(words["scope"], own, where)
    if scope.condition is not None and condition_birth is not None:
        scope = replace(scope, condition=replace(scope.condition, birth=condition_birth))
    held = {name: tensors[f"{i}.{name}"] for name in tensor_names(kind) if f"{i}.{name}" in tensors}
    if lost := [f"{i}.{name}" for name in tensor_names(kind) if name not in held]:
        raise ValueError(f"{path.with_suffix('.safetensors')} lacks keys: {', '.join(lost)}.")
    values = {name: words[name] for name in names}
    return Step(read(kind, values, where, tensors=held, birth=birth), scope)


def _birth(births: Sequence[Provenance], number: Any, where: str) -> Provenance | None:
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(births):
        raise ValueError(f"{where} has birth {number!r}, but the recipe has {len(births)} births, numbered from 0.")
    return births[number]
