"""What the documentation prints runs as printed; the site builds without a warning, and has every public name."""

import ast
import importlib
import subprocess
import sys
from importlib.util import find_spec

import pytest
from pages import ROOT, blocks, check, mentioned, pages, run, same
from public import public_names
from sphinx.util.inventory import InventoryFile

# Half a minute or more each; `make slow` runs them.
LONG = ("heads", "compare", "experts", "signals", "latents", "decoding")
AMONG_OTHERS = find_spec("nnsight") is not None and find_spec("lm_eval") is not None
BESIDE = pytest.mark.skipif(not AMONG_OTHERS, reason="what it compares with is not installed: make peers")


def marks(page):
    return [mark for mark, holds in ((pytest.mark.slow, page.stem in LONG), (BESIDE, page.stem == "beside")) if holds]


HOWTO = ROOT / "docs" / "howto"
PAGES = [pytest.param(page, marks=marks(page) if page.parent == HOWTO else ()) for page in pages()[1:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_a_page_runs_as_printed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page.read_text()):
        got = run(block, names)
        assert block.printed is None or same(block.printed, got), f"{page.name}, line {block.line}, prints:\n{got}"


@pytest.mark.parametrize("page", sorted(HOWTO.glob("*.md")), ids=lambda page: page.stem)
def test_a_job_takes_at_most_fifteen_lines(page):
    longest = [
        sum(map(bool, map(str.strip, b.text.splitlines()))) for b in blocks(page.read_text()) if b.kind == "python"
    ]
    assert max(longest, default=0) <= 15


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_that_a_page_mentions_are_known(page):
    for command in mentioned(page.read_text()):
        check(command)


ALL = [pytest.param(page, marks=BESIDE if page.stem == "beside" else ()) for page in pages()]


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_imports_is_there(page):
    for block in blocks(page.read_text()):
        for node in ast.walk(ast.parse(block.text)) if block.kind == "python" else ():
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "--keep-going", "-b", "html", "docs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return folder


def test_every_public_name_is_in_the_reference(site):
    with (site / "objects.inv").open("rb") as file:
        kinds = InventoryFile.load(file, "", lambda *parts: "/".join(parts))
    listed = {name for kind, names in kinds.items() if kind.startswith("py:") for name in names}
    assert not [name for name, _ in public_names() if name not in listed]


def test_a_page_shows_what_a_function_takes_and_gives(site):
    page = (site / "reference" / "probes.directions.html").read_text()
    assert "The direction from texts b to texts a at a site" in page
    assert "position" in page
