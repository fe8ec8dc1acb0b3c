"""The reference as a site: its pages, what the stubs list as public, and the notebooks, which are shown as they are."""

import ast
import dataclasses
import importlib
import inspect
import os
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType

from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import ObjectEntry, PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project, author = "ThinkSteer", "ThinkSteer"
release = version = metadata.version("thinksteer")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "myst_nb"]
html_theme = "furo"
html_title = f"ThinkSteer {release}"
html_show_copyright = False
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
default_role = "code"
python_use_unqualified_type_names = True
python_display_short_literal_types = True
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 90
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "undoc-members": True}

nitpicky = True
nitpick_ignore_regex = [("py:class", "Tensor|ndarray")]  # as they stand within a shape; for others see `_no_page`
suppress_warnings = [
    "mystnb.unknown_mime_type",  # an interactive figure is drawn by the notebook, not by the site
    "ref.python",  # `bytes` is a type in a signature, and a field of two of our own classes
]

if os.environ.get("DOCS_ONLINE") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://pytorch.org/docs/stable", None),
        "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "pandas": ("https://pandas.pydata.org/docs", None),
    }

PACKAGES = sorted(
    ".".join(stub.parent.relative_to(ROOT).parts) for top in ("probes", "steer") for stub in (ROOT / top).rglob("*.pyi")
)


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", lambda _: _write_pages())
    app.connect("source-read", _only_pages_there_are)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _as_rest)
    app.connect("autodoc-process-signature", _parsable)
    app.connect("env-check-consistency", _alias)
    app.connect("warn-missing-reference", _no_page)


def _write_pages() -> None:
    """A page for each package, from the stub beside it, and a copy of each notebook: all are left out of git."""
    for package in PACKAGES:
        _write(HERE / "reference" / f"{package}.rst", _page(package))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        _write(HERE / "notebooks" / notebook.name, notebook.read_text())


def _only_pages_there_are(_app: Sphinx, page: str, source: list[str]) -> None:
    """The index names pages in one list, with a pattern for some: a page that is not there is not looked for."""
    if page == "index":
        lines = source[0].splitlines()
        source[0] = "\n".join(x for x in lines if not _ENTRY.fullmatch(x) or any(HERE.glob(f"{x}.*")))


_ENTRY = re.compile(r"[a-z]+(?:/[a-z*]+)?")


def _write(path: Path, text: str) -> None:
    """Only what is new, so that a second build reads no page again."""
    path.parent.mkdir(exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _homes(package: str) -> dict[str, str]:
    """Each public name of a package, in the order of its stub, with the module that defines it."""
    stub = ROOT.joinpath(*package.split("."), "__init__.pyi")
    found = {}
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                home = package if node.module is None else f"{package}.{node.module}"
                found[name.asname or name.name] = home
    return found


def _page(package: str) -> str:
    module = importlib.import_module(package)
    names = _homes(package)
    title = f"{package}\n{'=' * len(package)}\n\n.. py:module:: {package}\n\n{(module.__doc__ or '').strip()}\n\n"
    listed = ", ".join(f":py:obj:`{name} <{_home(package, name)}>`" for name in names)
    if "." not in package:  # what it lists has its entry on the page of the package it lives in
        return f"{title}``from {package} import`` {listed}.\n"
    values = {name: getattr(module, name) for name in names}
    last = sorted(
        names, key=lambda name: isinstance(values[name], ModuleType)
    )  # what follows a module would be its own
    return title + "".join(_entry(package, name, names[name], values[name]) for name in last)


def _home(package: str, name: str) -> str:
    """The longest public name of a thing: the one in the package it lives in."""
    value = getattr(importlib.import_module(package), name)
    for other in PACKAGES:
        if other.startswith(f"{package}.") and getattr(importlib.import_module(other), name, None) is value:
            return f"{other}.{name}"
    for public in (f"{p}.{n}" for p in PACKAGES for n in _homes(p)):
        thing = getattr(importlib.import_module(public.rpartition(".")[0]), public.rpartition(".")[2])
        if isinstance(thing, ModuleType) and getattr(thing, name, None) is value:
            return f"{thing.__name__}.{name}"
    return f"{package}.{name}"


def _entry(package: str, name: str, home: str, value: object) -> str:
    full = f"{package}.{name}"
    if isinstance(value, ModuleType):
        heading = f"{name}\n{'-' * len(name)}\n\n"
        made = {x: y for x, y in vars(value).items() if dataclasses.is_dataclass(y) and not inspect.isclass(y)}
        constants = "".join(_entry(full, x, full, y) for x, y in made.items() if x.isupper())
        return f"{heading}.. automodule:: {full}\n\n{constants}"
    if inspect.isclass(value):
        return f".. autoclass:: {full}\n\n"
    if inspect.isroutine(value):
        return f".. autofunction:: {full}\n\n"
    return f".. py:data:: {name}\n   :module: {package}\n\n{_indented(_about(name, home, value))}\n\n"


def _about(name: str, home: str, value: object) -> str:
    """Of a constant or a type: what stands under it in its module, and the value where it is short."""
    analyzer = ModuleAnalyzer.for_module(home)
    analyzer.analyze()
    lines = list(analyzer.attr_docs.get(("", name), ()))
    if isinstance(value, dict) or hasattr(value, "keys"):
        shown = ", ".join(f"`{key}`" for key in value)  # type: ignore[attr-defined]
    else:
        shown = f"`{_MODULE.sub('', str(value))}`"
    return "\n".join([*_rest(lines), "", shown])


_MODULE = re.compile(r"\b(?:[a-z_]+\.)+(?=[A-Z])")


def _indented(text: str) -> str:
    return "\n".join(f"   {line}".rstrip() for line in text.splitlines())


def _skip(_app: Sphinx, what: str, name: str, obj: object, skip: bool, _options: object) -> bool | None:
    """Of a class: what can be called or read; its fields are in its signature. Of a module: what it defines."""
    if skip or name.startswith("_"):
        return True
    if what == "class":
        field = inspect.ismemberdescriptor(obj) or isinstance(obj, dataclasses.Field)
        return field or not (callable(obj) or isinstance(obj, property | classmethod | staticmethod) or _cached(obj))
    return not (inspect.isclass(obj) or inspect.isroutine(obj))


def _cached(obj: object) -> bool:
    return type(obj).__name__ == "cached_property"


def _as_rest(_app: Sphinx, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    lines[:] = _rest(lines)


_SPAN = re.compile(r"(``.+?``|`[^`]+`|(?<!\w)\*\([^*]+\)\*|(?<![\w*])\*\w[^*\n]*\*(?![\w*]))")
_SPECIAL = re.compile(r"[*|\\]|(?<=\w)_(?!\w)")


def _rest(lines: list[str]) -> list[str]:
    """A docstring in plain English as reStructuredText: names in backticks, examples and *(author year)* stay."""
    text = list[str]()
    for paragraph in re.split(r"\n[ ]*\n", "\n".join(lines)):
        words, prompt, example = paragraph.partition(">>>")
        parts = _SPAN.split(words)
        plain = [
            (_literal(part) if part[0] == "`" else part) if i % 2 else _SPECIAL.sub(r"\\\g<0>", part)
            for i, part in enumerate(parts)
        ]
        text += ["", *"".join(plain).rstrip().splitlines(), "", *(prompt + example).splitlines()]
    return [*text, ""]


def _literal(span: str) -> str:
    """Code as it is, backslashes too; what has an entry here is a link to it."""
    name = span.strip("`")
    return f":py:obj:`{name}`" if name in _public() else f"``{name}``"


@cache
def _public() -> frozenset[str]:
    return frozenset(f"{package}.{name}" for package in PACKAGES for name in _homes(package)) | {*PACKAGES}


def _parsable(
    _app: Sphinx, _what: str, _name: str, _obj: object, _options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A default that is no Python, such as `<factory>`, would keep the whole signature from being read."""
    return signature and re.sub(r"(?<==)( ?)<[^<>]*>", r"\1...", signature), returns


def _no_page(_app: Sphinx, domain: PythonDomain | None, node: pending_xref) -> bool | None:
    """A name that exists and has no page here, private or of another package, is written and not linked; one that does
    not exist is an error, and so is a public one that is not in the reference."""
    target = node.get("reftarget", "")
    known = domain is not None and domain.name == "py" and target not in _public() and _exists(target)
    return True if known else None


def _exists(target: str) -> bool:
    module, _, name = target.rpartition(".")
    try:
        return bool(module) and hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def _alias(_app: Sphinx, env: BuildEnvironment) -> None:
    """`steer.Recipe` is found where `steer.recipes.Recipe` is: every public name is in the site's index of names."""
    domain = env.get_domain("py")
    assert isinstance(domain, PythonDomain)
    for package in PACKAGES:
        for name in _homes(package):
            full, home = f"{package}.{name}", _home(package, name)
            if full not in domain.objects and home in domain.objects:
                entry = domain.objects[home]
                domain.objects[full] = ObjectEntry(entry.docname, entry.node_id, entry.objtype, True)
