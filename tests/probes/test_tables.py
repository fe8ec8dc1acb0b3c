"""What has a table prints it, and the repr of what is large is short."""

import re

import pandas
import pytest
import torch

from probes import Completion, Direction, Sampling, Span, direction_between, generate, load
from probes.activations import HeadScores, counting, read_experts, record
from probes.tables import Table
from probes.thinking import segments, thinking
from steer import Ablate, Add, Condition, Controller, Recipe, Scope, applied, diff, evaluate, task_named
from steer.deltas import open_delta
from steer.interventions import Affine

LONGEST = 2000


@pytest.fixture(scope="module")
def model():
    return load("organism")


@pytest.fixture(scope="module")
def done(model) -> list[Completion]:
    return generate(model, ["a 3 b +4 c *7", "a 1 b +2"], sampling=Sampling.of(model))


@pytest.fixture(scope="module")
def direction(model) -> Direction:
    return direction_between(model, ["a 3 b +4"], ["a 1 b *7"], "L2.resid_post")


def big(model, done, direction):
    vector = torch.randn(5000)
    site = direction.site
    many = Scope("thinking", tokens=tuple(range(4000)), controller=Controller(12, 1.0, site, vector))
    with counting(model) as counts:
        generate(model, ["a 3 b +4"], sampling=Sampling.of(model))
    problems = task_named("chains").sample(2, "report")
    yield from (
        Add(site, vector), Ablate(site, vector, birth=(direction + direction).provenance), Condition(site, vector, 0.1),
        Controller(3, 1.0, site, vector), many, Span(tuple(range(9000)), 0, 9000),
        Affine(vector[:, None], vector[None], vector),
        Recipe.of(model, [Add.of(direction, 1.0)] * 300), direction, direction + direction, done[0], thinking(done[0]),
        record(model, [thinking(c) for c in done], [site])[site], HeadScores(torch.randn(64, 64), "x"), counts,
        read_experts(model, done), segments(model, done[0], "organism")[0], open_delta("organism-rl"),
        open_delta("organism-rl").terms[0].source, diff("organism", "organism"),
        evaluate(model, task_named("chains"), problems, {}, sampling=Sampling.of(model)),
        Completion("0", 0, "p" * 9000, "t" * 9000, "a", (1,) * 9000, (2,) * 9000, None, "eos", Sampling.of(model), "m"),
    )  # fmt: skip


def test_no_repr_is_long_and_it_names_the_class(model, done, direction):
    for value in big(model, done, direction):
        text = repr(value)
        assert len(text) <= LONGEST, (type(value), text[:300])
        assert text.startswith(type(value).__name__)
        assert not re.search(r"\d\.\d{4}, ", text), f"numbers of a tensor: {text[:300]}"
        assert len(str(value)) <= 300 * LONGEST


def test_a_printed_recipe_names_its_steps_and_not_its_numbers(model, direction):
    recipe = Recipe.of(model, [Add.of(direction, 0.5), Ablate.of(direction)], scope="thinking", method="mine")
    lines = str(recipe).splitlines()
    assert "mine, made on organism" in lines[0]
    assert [re.search(r"add|ablate", line)[0] for line in lines if "L2.resid_post" in line] == ["add", "ablate"]
    assert "tensor" not in str(recipe) + repr(recipe)


def test_print_of_a_table_is_the_table_in_whole_lines(model, direction):
    with applied(model, Recipe.of(model, [Add.of(direction, 0.5)])) as fired:
        generate(model, ["a 3 b +4"], sampling=Sampling.of(model))
    text = str(fired.table())
    assert str(fired) == text
    assert all(column in text for column in fired.table().columns)
    assert max(map(len, text.splitlines())) < 200
    long = Table(("a", "b"), (("x" * 300, 1.0), ("y", 2.5)), "t")
    assert "x" * 300 in str(long)
    assert repr(long) == "Table(2 rows of a, b)"


def test_a_frame_is_one_of_pandas():
    frame = HeadScores(torch.arange(30.0).view(5, 6), "x").to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 30
    assert len(HeadScores(torch.arange(30.0).view(5, 6), "x").table().rows) == 10
