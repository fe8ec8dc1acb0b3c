"""What is added takes the places that CONTRIBUTING names, and no more: a kind, a family, a task, a format, a method.

Each test adds one in those places alone, and then uses it in every way; it fails where another place must know of it.
"""

import ast
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import ClassVar

import pytest
import torch
import typer
from families import build
from public import PACKAGES
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import steer.interventions.kinds
import steer.recipes.recipe
from probes import Direction, Sampling, Site, captured, difference_in_means, generate, load
from probes.directions import Provenance
from probes.model import broken_identity, sites_in
from probes.model.families import ARCHITECTURES
from probes.thinking import thinking
from steer import Add, Recipe, applied, evaluate, export, fold, folded, task_named
from steer.cli.main import COMMANDS, app, application
from steer.folding import export_adapter
from steer.interop import FORMATS, Format, export_recipe, import_recipe
from steer.interventions import Affine
from steer.tasks import Problem
from steer.tasks.published import SOURCES, Dataset

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, eq=False)
class Mirror:
    """x - (1 + strength) * (x.v̂) v̂: reflected at the plane across the vector, at strength 1."""

    kind: ClassVar[str] = "mirror"
    site: Site
    vector: Tensor
    strength: float = 1.0
    loud: bool = False
    birth: Provenance | None = None

    def check(self, model: PreTrainedModel) -> None:
        if len(self.vector) != model.config.hidden_size:
            raise ValueError("The mirror does not fit.")

    def affine(self, width: int) -> Affine:
        unit = self.vector.float() / self.vector.float().norm()
        return Affine(-(1 + self.strength) * unit[:, None], unit[None, :], torch.zeros(width))

    def __call__(self, x: Tensor) -> Tensor:
        return self.affine(x.shape[-1])(x)


@torch.no_grad()
def test_a_kind_of_intervention_is_a_class_and_a_row(monkeypatch, tmp_path):
    kinds = MappingProxyType({**steer.interventions.kinds.KINDS, Mirror.kind: Mirror})
    for module in (steer.interventions.kinds, steer.recipes.recipe):  # one table, which the other imports
        monkeypatch.setattr(module, "KINDS", kinds)
    model, site = load("organism"), Site(1, "attn_out")
    vector = torch.randn(96, generator=torch.Generator().manual_seed(0))
    recipe = Recipe.of(model, [Mirror(site, vector, 0.5, loud=True)])

    recipe.save(tmp_path / "r")  # the recipe file
    (step,) = Recipe.load(tmp_path / "r").steps
    assert (step.intervention.kind, step.intervention.strength, step.intervention.loud) == ("mirror", 0.5, True)
    assert torch.equal(step.intervention.vector, vector)

    ids = torch.tensor([[1, 6, 17, 5, 3]])
    plain = model(ids).logits
    with applied(model, recipe) as fired, captured(model, [site]) as seen:  # run time
        steered = model(ids).logits
    assert fired.tokens == ids.numel()
    assert not torch.allclose(steered, plain)
    assert site in seen
    twin = folded(model, recipe)  # folding, and both exports
    torch.testing.assert_close(twin(ids).logits, steered, atol=1e-4, rtol=0)
    export(model, recipe, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(exported(ids).logits, steered, atol=1e-4, rtol=0)
    assert export_adapter(model, recipe, tmp_path / "lora").tensors
    with pytest.raises(ValueError, match="The mirror does not fit"):
        Recipe.of(model, [Mirror(site, vector[:7])]).check(model)


@torch.no_grad()
def test_a_family_is_a_row(monkeypatch):
    model = build("llama")
    model.config.model_type = "brandnew"
    monkeypatch.setitem(ARCHITECTURES, "brandnew", ARCHITECTURES["llama"])
    model = load(model)
    assert broken_identity(model) is None
    ids = torch.tensor([[1, 7, 8, 5, 3]])
    recipe = Recipe.of(model, [Add(site, torch.ones(32)) for site in sites_in(model, "attn_out")])
    with applied(model, recipe) as fired:
        model(ids)
    assert fired.tokens == 3 * ids.numel()
    assert recipe.model["model_type"] == "brandnew"
    with pytest.raises(ValueError, match="no one bias|no bias"):
        fold(model, recipe)


def test_a_published_task_is_a_reader_and_a_row(monkeypatch, tmp_path):
    def read(row, _):
        return Problem(row["q"], row["q"], str(row["a"]))

    monkeypatch.setitem(SOURCES, "mine", Dataset("who/mine", None, "train", ("q", "a"), "exact", read))
    rows = [{"q": f"a {i} b +{j}", "a": (i + j) % 10} for i in range(10) for j in range(1, 10)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = task_named("mine", path=tmp_path)
    model = load("organism")
    problems = task.sample(4, "report")
    found = evaluate(model, task, problems, {}, sampling=Sampling.of(model, max_new_tokens=48))
    assert found.score("plain").n == 4
    with pytest.raises(ValueError, match="mine"):
        task_named("nothing known")


def test_a_format_is_a_module_and_a_row(monkeypatch, tmp_path):
    def write(recipe: Recipe, path: Path) -> None:
        path.write_text(json.dumps([float(x) for x in recipe.steps[0].intervention.vector]))

    def read(path: Path, model: PreTrainedModel) -> Recipe:
        return Recipe.of(model, [Add(Site(1, "resid_post"), torch.tensor(json.loads(path.read_text())))])

    module = ModuleType("steer.interop.mine")
    module.write, module.read = write, read
    monkeypatch.setitem(sys.modules, "steer.interop.mine", module)
    monkeypatch.setitem(FORMATS, "mine", Format("me", (".mine",), "mine"))
    model = load("organism")
    recipe = Recipe.of(model, [Add(Site(1, "resid_post"), torch.arange(96.0))])
    export_recipe(recipe, tmp_path / "v.mine", "mine", model=model)
    again = import_recipe(tmp_path / "v.mine", model)  # told by its name
    assert torch.equal(again.steps[0].intervention.vector, recipe.steps[0].intervention.vector)

    recipe.save(tmp_path / "r")  # and both commands take it
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["export", "r", "--to", "mine", "-o", "w.mine"]).exit_code == 0
    assert CliRunner().invoke(app, ["import", "w.mine", "organism", "-o", "back"]).exit_code == 0
    assert Recipe.load(tmp_path / "back").steps[0].intervention.kind == "add"


def test_a_command_is_a_function_and_a_line(monkeypatch):
    def hello(name: str) -> None:
        """Says hello."""
        typer.echo(f"hello {name}")

    monkeypatch.setitem(COMMANDS, "hello", hello)
    result = CliRunner().invoke(application(), ["hello", "you"])
    assert result.output.strip() == "hello you"
    assert "Says hello" in CliRunner().invoke(application(), ["--help"]).output


def test_a_method_uses_public_names_alone_and_nobody_needs_to_know_of_it(tmp_path):
    """A method is a module of functions over public names; its one other place is the stub of `steer.methods`."""

    def directions(model, short, long) -> list[Direction]:
        spans = [[thinking(c) for c in part] for part in (long, short)]
        return list(difference_in_means(model, *spans, sites_in(model, "resid_post")).values())

    def recipe(model, direction, strength) -> Recipe:
        return Recipe.of(model, [Add.of(direction, strength)], scope="thinking", method="mine (after nobody)")

    model, task = load("organism"), task_named("chains")
    sampling = Sampling.of(model, max_new_tokens=48)
    done = sorted(
        generate(model, [p.question for p in task.sample(12, "probe")], sampling=sampling),
        key=lambda c: c.thinking_tokens,
    )
    mine = recipe(model, directions(model, done[:6], done[6:])[2], 0.5)
    found = evaluate(model, task, task.sample(4, "report"), {"mine": mine}, sampling=sampling)
    assert set(found.arms) == {"plain", "mine"}
    mine.save(tmp_path / "r")
    assert Recipe.load(tmp_path / "r").method == "mine (after nobody)"


def test_the_stub_of_the_methods_names_each_module_of_the_folder():
    stub = ast.parse((ROOT / "steer" / "methods" / "__init__.pyi").read_text())
    names = {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    modules = {path.stem for path in (ROOT / "steer" / "methods").glob("*.py") if not path.stem.startswith("_")}
    assert names == modules


def test_a_package_s_stub_is_the_one_list_of_its_names():
    assert {"probes", "steer", "steer.methods", "probes.model"} <= set(PACKAGES)
    for package in PACKAGES:
        text = (ROOT / package.replace(".", "/") / "__init__.py").read_text()
        assert "__all__ = exports(" in text, package
