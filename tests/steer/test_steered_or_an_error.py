"""A recipe steers, or it is an error: where it never fired, and where its numbers could not."""

import subprocess
import sys

import pytest
import torch

from probes import Direction, Sampling, Site, direction_between, load
from steer import (
    Ablate,
    Add,
    Condition,
    Controller,
    NeverFired,
    Recipe,
    Schedule,
    Scope,
    evaluate,
    task_named,
)
from steer.evaluation import solve

SITE = Site(1, "resid_post")


@pytest.fixture(scope="module")
def model():
    return load("organism")


@pytest.fixture(scope="module")
def task():
    return task_named("chains")


def never(model) -> Recipe:
    """Touches tokens after the ninetieth thought, of which there is none."""
    scope = Scope("thinking", window=(90, None))
    return Recipe.of(model, [Add(SITE, torch.ones(96))], scope=scope)


def test_an_arm_that_touches_nothing_is_an_error_and_no_zero(model, task):
    problems, sampling = task.sample(4, "report"), Sampling.of(model, max_new_tokens=48)
    for arm in (never(model), [never(model), never(model)]):
        with pytest.raises(NeverFired, match=r"add at L1.resid_post, scope thinking, positions 90 to the end"):
            evaluate(model, task, problems, {"arm": arm}, sampling=sampling)
    with pytest.raises(NeverFired):
        evaluate(model, task, problems, {}, baseline=never(model), sampling=sampling)


def test_an_arm_whose_completions_are_all_stored_need_not_run(model, task, tmp_path):
    problems, sampling = task.sample(4, "report"), Sampling.of(model, max_new_tokens=48)
    arms = {"arm": Recipe.of(model, [Add(SITE, torch.ones(96))])}
    first = evaluate(model, task, problems, arms, sampling=sampling, store=tmp_path)
    assert evaluate(model, task, problems, arms, sampling=sampling, store=tmp_path).to_dict() == first.to_dict()
    assert len(solve(model, problems, sampling=sampling)) == 4


SCRIPT = """
import torch
from probes import Site
from steer import Ablate, Add, Clamp, Condition, Controller, Rotate
site = Site(1, "resid_post")
rows = {
    "[32, 1]": torch.ones(32, 1), "torch.int64": torch.ones(32, dtype=torch.long),
    "torch.complex64": torch.ones(32, dtype=torch.complex64), "NaN": torch.full((32,), torch.nan),
}
for maker in (Add, Ablate, Clamp, Rotate, lambda s, v: Condition(s, v, .1), lambda s, v: Controller(12, 1., s, v)):
    for name, row in rows.items():
        try:
            maker(site, row)
        except ValueError as error:
            assert str(error).startswith("The vector for ") and name in str(error), error
        else:
            raise SystemExit(f"{maker} took {name}")
print("all refused")
"""


def test_a_vector_is_one_row_of_finite_floats():
    """In a process of its own: here, in the tests, shapes and dtypes are checked before the sentence is reached."""
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "all refused", result.stderr


V = torch.ones(96)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Add(SITE, V, 1e300), "The add at L1.resid_post has strength 1e\\+300. Give a finite number"),
        (lambda: Ablate(SITE, V, target=float("nan")), "The ablate at L1.resid_post has target nan"),
        (lambda: Condition(SITE, V, float("inf")), "The condition at L1.resid_post has threshold inf"),
        (lambda: Controller(12, float("nan")), "The controller has gain nan"),
        (lambda: Controller(12, 1.0, SITE, V, 1e39), "The controller has offset 1e\\+39"),
        (lambda: Schedule("linear", 0.0, 1e300, 3), "The schedule has end 1e\\+300"),
    ],
)
def test_a_number_is_finite_where_it_is_given(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_direction_has_a_norm_of_the_stream_that_is_none_below_zero(model):
    found = direction_between(model, ["a 3 b +4"], ["a 1 b *7"], SITE)
    with pytest.raises(ValueError, match="has stream_norm -1.0: a norm is 0 or more"):
        Direction(SITE, found.vector, -1.0, found.provenance)
    with pytest.raises(ValueError, match="The direction at L1.resid_post has stream_norm nan"):
        Direction(SITE, found.vector, float("nan"), found.provenance)
