"""Every public callable says what it does and shows it: its docstring holds an example, and the example runs."""

import doctest
import inspect

import pytest
from public import public_callables

CALLABLES = public_callables()
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", CALLABLES)
def test_the_example_of_a_public_name_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(CALLABLES[name]) or ""
    examples = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert examples.examples, f"{name} shows no example."
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(examples, out=said.append)
    assert not result.failed, "".join(said)
