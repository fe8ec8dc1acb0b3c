"""A sweep chooses on one split and reports on another, beside controls that are what their names say."""

import json

import pytest
import torch

from probes import load
from probes.directions.direction import difference_in_means, random_direction
from probes.figures.plots import Point, pareto_front
from probes.generation.sampling import Sampling
from probes.model.sites import Site
from steer.cli.main import app
from steer.evaluation._evaluate import solve
from steer.evaluation._sweep import LabelledDirection, sweep
from steer.interventions.activation import Add
from steer.methods.thinkedit import LengthSplit
from steer.recipes.recipe import Recipe
from steer.recipes.scope import Scope
from steer.runtime.calibration import divergence
from steer.tasks.named import task_named

SITE = Site(2, "resid_post")
OPENING = Scope("thinking", window=(0, 1))


@pytest.fixture(scope="module")
def setting():
    model, task = load("organism"), task_named("chains")
    sampling = Sampling.of(model, max_new_tokens=48)
    probed = solve(model, task.sample(250, "probe"), sampling=sampling, batch_size=250)
    short, long = LengthSplit.by_quantile(probed).spans("first")
    return model, task, sampling, LabelledDirection.of(model, long, short, SITE)


@pytest.fixture(scope="module")
def made(setting):
    """A sweep, and every recipe that it asked for."""
    model, task, sampling, contrast = setting
    asked = []

    def make(direction, strength):
        asked.append((direction, strength))
        return Recipe.of(model, [Add.of(direction, strength, units="raw")], scope=OPENING)

    found = sweep(
        model, task, contrast, make, (-1.0, 0.0, 1.0, 2.0),
        select=task.sample(60, "select"), report=task.sample(150, "report"), judge=contrast.positive[:40],
        sampling=sampling, draws=2, batch_size=150,
    )  # fmt: skip
    return found, asked, make


def test_the_choice_is_the_best_of_the_selection_split_and_the_report_shares_no_problem_with_it(made):
    found, _, _ = made
    accuracy = {s: found.selection.score(f"strength {s:+g}").accuracy for s in found.strengths}
    assert accuracy[found.selected] == max(accuracy.values())
    assert not {p.id for p in found.selection.problems} & {p.id for p in found.report.problems}
    assert list(found.report.arms) == [
        "plain", *(f"strength {s:+g}" for s in found.strengths),
        "random direction", "shuffled labels", "random direction, same KL",
    ]  # fmt: skip
    assert found.report.score("shuffled labels").samples == 2


def test_longer_is_longer_and_zero_is_plain(made):
    found, _, _ = made
    lengths = [found.report.score(f"strength {s:+g}").length for s in found.strengths]
    assert lengths == sorted(lengths)
    assert (found.report.arms["strength +0"].length == found.report.arms["plain"].length).all()
    best, control = (found.report.score(arm) for arm in (f"strength {found.selected:+g}", "random direction"))
    assert best.difference_interval[0] > control.difference_interval[1]
    assert "chosen on the selection split" in found._repr_html_()
    drawn = {trace.name: trace for trace in found.figure().data}
    assert set(found.report.arms) | {"Pareto front"} == set(drawn)


def test_controls_have_the_norm_and_the_divergence_of_what_they_control(made, setting):
    found, asked, make = made
    model, _, _, contrast = setting
    controls = [direction for direction, strength in asked[4:] if strength == found.selected]
    assert len(controls) == 6
    for direction in controls:
        assert direction.norm == pytest.approx(contrast.direction.norm, rel=1e-5)
    assert divergence(model, make(contrast.direction, found.selected), contrast.positive[:40]) == pytest.approx(
        found.kl
    )


def test_shuffled_labels_keep_the_class_sizes_and_nothing_else(setting):
    model, _, _, contrast = setting
    null = contrast.shuffled(model, seed=3)
    spans = [*contrast.positive, *contrast.negative]
    order = torch.randperm(len(spans), generator=torch.Generator().manual_seed(3)).tolist()
    mixed, n = [spans[i] for i in order], len(contrast.positive)
    expected = difference_in_means(model, mixed[:n], mixed[n:], [SITE])[SITE]
    torch.testing.assert_close(null.unit, expected.unit)
    assert expected.norm < 0.5 * contrast.direction.norm
    assert not torch.equal(null.vector, contrast.shuffled(model, seed=4).vector)
    assert not torch.equal(null.vector, random_direction(contrast.direction, seed=3).vector)


def test_a_split_that_saw_the_choice_is_refused(setting):
    model, task, sampling, contrast = setting
    problems = task.sample(5, "select")
    with pytest.raises(ValueError, match="1 problems are in both splits, such as .*: choose on others."):
        sweep(
            model, task, contrast, lambda *_: None, (0.0,), select=problems, report=problems[:1],
            judge=contrast.positive, sampling=sampling,
        )  # fmt: skip


def test_the_front_holds_the_arms_that_none_beats():
    planted = {"a": (5, 0.3), "b": (6, 0.2), "c": (8, 0.6), "d": (8, 0.5), "e": (12, 0.6), "f": (15, 0.9)}
    points = [Point(name, *values, (0, 1)) for name, values in planted.items()]
    assert [point.name for point in pareto_front(points)] == ["a", "c", "f"]


def test_the_command_writes_the_chosen_recipe_and_tells_the_controls(setting, tmp_path, capsys):
    _, _, _, contrast = setting
    words = {"w": ["a 3 b +4", "a 5 c -1"], "v": ["a 3 b +4 quick", "a 5 c -1 quick"]}
    for name, texts in words.items():
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sides = [
        "--positive",
        str(tmp_path / "w"),
        "--negative",
        str(tmp_path / "v"),
        "--site",
        str(contrast.direction.site),
    ]
    sizes = ["--n-select", "20", "--n-report", "30", "--draws", "1", "--strength", "-0.02", "--strength", "0.02"]
    app(["sweep", "organism", *sides, *sizes, "-o", str(tmp_path / "r"), "--json"], standalone_mode=False)
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["selected"] == Recipe.load(tmp_path / "r").steps[0].intervention.strength
    assert {"plain", "random direction", "shuffled labels"} <= set(facts["report"])
