"""What start-up does not pay for: `--help` imports no heavy library, and `import steer` imports not even torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import probes

HEAVY = ("torch", "transformers", "plotly", "pandas", "scipy", "numpy", "peft", "accelerate", "huggingface_hub")
SCRIPT = """
import json, sys
import typer
from click.testing import CliRunner
from steer.cli.main import app

def walk(command, path):
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0 and "Usage" in result.output, (path, result.output, result.exception)
    yield " ".join(path)
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))

names = list(walk(typer.main.get_command(app), ("steer",)))
print(json.dumps({"names": names, "modules": list(sys.modules)}))
"""


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


def test_every_help_is_told_without_a_heavy_library():
    told = json.loads(python("-c", SCRIPT))
    assert {"steer", "steer evaluate", "steer rice", "steer vector add", "steer import"} <= set(told["names"])
    assert len(told["names"]) >= 21
    assert sorted(set(told["modules"]) & set(HEAVY)) == []


@pytest.mark.parametrize("package", ["steer", "probes", "steer.evaluation", "probes.model", "steer.cli.main"])
def test_a_package_is_imported_without_a_heavy_library(package):
    loaded = python("-c", f"import sys, {package}; print(*sys.modules)").split()
    assert sorted(set(loaded) & set(HEAVY)) == []


def test_late_libraries_are_loaded_with_the_names_that_use_them_and_not_before():
    """All of `steer` and `probes` is in reach, and neither plotly nor pandas, peft nor datasets was needed for it."""
    touch = "[getattr(m, n) for m in (steer, probes) for n in m.__all__]"
    loaded = python("-c", f"import sys, steer, probes; {touch}; print(*sys.modules)").split()
    assert "torch" in loaded
    within = {"plotly.basedatatypes", "scipy.stats._stats_py", "pandas", "peft", "datasets"}  # loaded where these are
    assert sorted(within & set(loaded)) == []


ADDING = """
import sys
from steer.cli.main import app
try:
    app(["vector", "add", sys.argv[1], "organism-rl", "-o", sys.argv[2]])
except SystemExit as end:
    assert not end.code, end.code
print(*sys.modules)
"""


def test_sums_of_weights_need_no_model_code(tmp_path):
    """The deltas are files, and so are the checkpoints: transformers' imports would take longer than small sums."""
    organism = Path(probes.__file__).parent / "model" / "organism"
    loaded = python("-c", ADDING, str(organism), str(tmp_path / "out")).split()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "torch" in loaded
    assert sorted({"transformers", "peft", "plotly", "pandas", "scipy", "datasets"} & set(loaded)) == []


def test_the_version_is_told_three_ways():
    version = python("-c", "import steer; print(steer.__version__)").strip()
    assert version == "0.2.0"
    assert python("-m", "steer", "--version").strip() == f"thinksteer {version}"


def test_an_old_name_tells_the_new_one():
    script = "from steer.decoding import Ask"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "steer.decoding.Ask is now steer.decoding.PromptStyle." in result.stderr
