"""Every public callable says what it does and shows it: its docstring holds an example, and the example runs."""

import doctest
import inspect

import pytest
from public import public_callables

CALLABLES = public_callables()
LONGEST = 2000  # characters of a repr
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", CALLABLES)
def test_the_example_of_a_public_name_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(CALLABLES[name]) or ""
    shown: dict[str, object] = {}
    examples = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    examples.globs = shown
    assert examples.examples, f"{name} shows no example."
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(examples, out=said.append, clear_globs=False)
    assert not result.failed, "".join(said)
    long = {key: len(repr(value)) for key, value in shown.items() if ours(value) and len(repr(value)) > LONGEST}
    assert not long, f"These print more than {LONGEST} characters: {long}"


def ours(value):
    return type(value).__module__.partition(".")[0] in ("probes", "steer")
