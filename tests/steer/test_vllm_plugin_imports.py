"""The vLLM plugin stands alone: it imports nothing of ours, little else, and vLLM only where vLLM calls it."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from shutil import copytree

import pytest
from plugin import PLUGIN

from steer.engines.vllm import serving_settings
from steer.engines.vllm.settings import PLUGIN_VERSION

ROOT = Path(__file__).parents[2]
ALLOWED = {"torch", "numpy", "yaml", "safetensors", "thinksteer_vllm"} | set(sys.stdlib_module_names)
LATE = {"vllm", "fastapi"}  # inside functions; vLLM brings the other
OPTIONAL = {"triton"}  # behind a try


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def roots(nodes):
    return {name.partition(".")[0] for node in nodes for name in imported(node)}


def wrong(text):
    tree = ast.parse(text)
    inner = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)]
    tried = [n for t in ast.walk(tree) if isinstance(t, ast.Try) for n in t.body]
    outer = [n for n in ast.walk(tree) if n not in inner and n not in tried]
    return (roots(outer) - ALLOWED) | (roots(inner) - ALLOWED - LATE) | (roots(tried) - ALLOWED - OPTIONAL)


def test_it_imports_nothing_of_ours_and_vllm_only_when_it_is_called():
    files = list(PLUGIN.rglob("*.py"))
    assert len(files) > 10
    assert {path.name: wrong(path.read_text()) for path in files if wrong(path.read_text())} == {}


@pytest.mark.parametrize(
    "line", ["import steer", "from probes.model import Site", "import vllm", "def f():\n    import steer"]
)
def test_the_rule_is_red_where_it_is_broken(line):
    assert wrong(line)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    copytree(PLUGIN, folder / "source", ignore=lambda *_: ["build", "thinksteer_vllm.egg-info", "__pycache__"])
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", str(folder), str(folder / "source")], check=True, timeout=300)
    (path,) = folder.glob("*.whl")
    return path


def test_its_wheel_is_whole_and_imports_where_there_is_no_vllm(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(tmp_path)
    written = {str(path.relative_to(PLUGIN)) for path in (PLUGIN / "thinksteer_vllm").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == written
    (entry,) = tmp_path.glob("*.dist-info/entry_points.txt")
    lines = [line.replace(" ", "") for line in entry.read_text().splitlines() if line]
    assert lines == [
        "[vllm.endpoint_plugins]", "thinksteer=thinksteer_vllm.engine.addresses:Addresses",
        "[vllm.general_plugins]", "thinksteer=thinksteer_vllm:register",
    ]  # fmt: skip
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['vllm'] = None\n"
        "import thinksteer_vllm as t, thinksteer_vllm.engine.patches, thinksteer_vllm.engine.runners\n"
        "print(t.__file__, t.__version__, sorted({'steer', 'probes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    file, version, ours = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert (version, ours) == (PLUGIN_VERSION, "[]")


def test_versions_and_dependencies_are_told_once():
    own = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    assert own["version"] == PLUGIN_VERSION
    assert {line.partition(">")[0] for line in own["dependencies"]} == {"numpy", "pyyaml", "safetensors", "torch"}


def test_our_wheel_leaves_the_plugin_out():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["exclude"] == [str(PLUGIN.relative_to(ROOT))]


def test_a_recipe_that_changed_since_the_settings_were_written_is_refused(tmp_path):
    from types import SimpleNamespace

    import thinksteer_vllm
    from families import build
    from thinksteer_vllm.settings import settings_of

    from probes import Site
    from probes.model import delimiters_of
    from steer import Recipe, Scale

    model = build("llama")
    Recipe.of(model, [Scale(Site(1, "mlp_out"), 0.5)], scope="thinking").save(tmp_path / "r")
    settings = serving_settings({"r": tmp_path / "r"}, delimiters_of(model))
    assert settings["thinksteer"]["fingerprints"]["r"] == thinksteer_vllm.fingerprint(tmp_path / "r")
    read = settings_of(SimpleNamespace(additional_config=settings))
    assert read.sealed
    assert read.delimiters.open == delimiters_of(model).open
    path = tmp_path / "r" / "recipe.yaml"
    path.write_text(path.read_text().replace("0.5", "0.25"))
    later = {"thinksteer": dict(settings["thinksteer"])}  # as another process has them: what was read is remembered
    with pytest.raises(thinksteer_vllm.Refused, match="it has changed since they were written"):
        settings_of(SimpleNamespace(additional_config=later))
