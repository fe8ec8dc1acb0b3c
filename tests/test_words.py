"""A word that is not known is refused at every public door, by a sentence that lists those that are."""

import subprocess
import sys
from pathlib import Path

import pytest

from probes import Site, direction_between, load
from steer import Add
from steer.recipes import Scope

# In a process of its own: under test, other checks of types stand before ours.
LAW = """
import inspect, sys
sys.path.insert(0, sys.argv[1])
from public import public_callables
from probes.words import _listed

def doors():
    for name, thing in public_callables().items():
        yield name, thing
        if inspect.isclass(thing):
            for own in vars(thing):
                if not own.startswith("_") and callable(getattr(thing, own)):
                    yield f"{name}.{own}", getattr(thing, own)

count, open_doors = 0, []
for name, door in doors():
    try:
        parameters = inspect.signature(door).parameters
    except (TypeError, ValueError):
        continue
    for parameter in parameters.values():
        listed = _listed(parameter.annotation)
        if listed is None:
            continue
        count += 1
        try:
            door(**{parameter.name: "nonsense"})
        except ValueError as error:
            if str(listed.words[0]) in str(error) and "nonsense" in str(error):
                continue
        except TypeError:
            pass
        open_doors.append(f"{name}({parameter.name}=)")
print(count, open_doors)
"""


def test_every_public_door_checks_its_words():
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", LAW, here], capture_output=True, text=True, check=True, timeout=300)
    count, _, doors = done.stdout.strip().partition(" ")
    assert doors == "[]"
    assert int(count) > 30


SEEN = """
from probes import Site, direction_between, load
from steer import Add, Recipe
model = load("organism")
direction = direction_between(model, ["a 3"], ["a 4"], Site(1, "resid_post"))
for trial in (
    lambda: Add.of(direction, 1.0, units="norm"),
    lambda: direction_between(model, ["a 3"], ["a 4"], Site(1, "resid_post"), position="first"),
    lambda: Site(2, "foo"),
    lambda: Recipe.of(model, [Add.of(direction, 1.0)], scope="thoughts"),
):
    try:
        trial()
    except ValueError as error:
        print(error)
    else:
        print("PASSED")
"""


def test_the_words_that_were_taken_for_others():
    done = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, check=True, timeout=300)
    said = done.stdout.splitlines()
    assert said[0] == "units='norm' is not known. Known: 'stream', 'raw'."
    assert "'first'" in said[1]
    assert "Known" in said[1] or "text_last" in said[1]
    assert said[2].startswith("name='foo' is not known. Known: ")
    assert "thoughts" in said[3]
    assert "PASSED" not in said


def test_words_that_are_known_pass_and_what_is_no_word_is_left_to_others():
    model = load("organism")
    direction = direction_between(model, ["a 3"], ["a 4"], Site(1, "resid_post"))
    assert Add.of(direction, 1.0, units="raw").strength == pytest.approx(1.0)
    assert Scope("thinking").phase == "thinking"
