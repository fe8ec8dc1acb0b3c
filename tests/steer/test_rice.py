"""RICE chooses on one split and reports on another, and its controls are what their names say."""

import json

import pytest
import torch
from families import build
from transformers import AutoModelForCausalLM

from probes import load
from probes.model.delimiters import Delimiters
from probes.model.loading import tokenizer_of
from steer.cli.main import app
from steer.decoding.budgets import CloseBias
from steer.folding.draft import NotFoldable
from steer.interventions.routing import Reinforce
from steer.methods.rice import RiceSetting, nulls, rice, signed_markers
from steer.recipes.recipe import Recipe
from steer.recipes.scope import Scope
from steer.tasks.named import task_named

SMALL = {"n_probe": 60, "n_select": 40, "n_report": 60, "batch_size": 128, "draws": 2}


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("rice") / "kept"


def make(organism, kept):
    return rice(
        organism, "chains", top=(1, 2), strengths=(1.0, 16.0), controls={"close": CloseBias(-2.0)}, store=kept, **SMALL
    )


@pytest.fixture(scope="module")
def run(organism, kept):
    return make(organism, kept)


def test_the_choice_is_the_best_of_the_selection_split_and_the_report_shares_no_problem_with_it(run):
    accuracy = {arm: run.selection.score(arm).accuracy for arm in run.selection.arms if arm != "plain"}
    assert set(accuracy) == {"top 1 × 1", "top 1 × 16", "top 2 × 1", "top 2 × 16"}
    assert accuracy[str(run.selected)] == max(accuracy.values())
    probed = {p.id for p in task_named("chains").sample(SMALL["n_probe"], "probe")}
    splits = [probed, {p.id for p in run.selection.problems}, {p.id for p in run.report.problems}]
    assert sum(map(len, splits)) == len(set.union(*splits))


def test_every_strength_is_reported_beside_the_controls_and_a_strength_of_one_is_plain(run):
    selected, top = run.selected, run.selected.top
    shown = [f"top {top} × 1", f"top {top} × 16", "close", f"{selected}, renormalised"]
    drawn = [f"random experts × {selected.strength:g}", f"lowest scores × {selected.strength:g}"]
    assert list(run.report.arms) == ["plain", *shown, *drawn]
    assert run.report.score(drawn[0]).samples == SMALL["draws"]
    plain, one, strong = (run.report.arms[arm] for arm in ("plain", *shown[:2]))
    assert (one.correct == plain.correct).all()
    assert (one.length == plain.length).all()
    assert (strong.length != plain.length).any()


def test_the_figure_shows_every_strength_and_the_controls_at_the_chosen_one(run):
    drawn = {trace.name: trace for trace in run.figure().data if trace.showlegend is False}
    top, strength = run.selected.top, run.selected.strength
    assert list(drawn["highest scores"].x) == [1.0, 16.0]
    assert list(drawn["highest scores"].y) == [run.report.score(f"top {top} × {s}").accuracy for s in (1, 16)]
    random = f"random experts × {strength:g}"
    assert (drawn[random].x, drawn[random].y) == ((strength,), (run.report.score(random).accuracy,))


def test_the_recipe_reinforces_the_highest_scores_and_its_controls_others_of_about_the_same_load(run, organism):
    def experts(recipe):
        return [(s.intervention.site.layer, s.intervention.site.expert) for s in recipe.steps]

    association, setting = run.association, RiceSetting(2, 8.0)
    flat = association.score.flatten()
    best = sorted(range(flat.size), key=lambda i: -flat[i])[:2]
    assert association.top(2) == [(association.layers[i // 8], i % 8) for i in best]
    assert experts(run.recipe) == association.top(run.selected.top) == run.experts
    renormalised, drawn, lowest = nulls(organism, association, setting, draws=12).values()
    assert [s.intervention.renormalise for s in renormalised[0].steps] == [True, True]
    assert experts(renormalised[0]) == association.top(2)
    assert experts(lowest[0]) == association.bottom(2)
    load = {e: association.load[association.layers.index(e[0]), e[1]] for e in association.top(32)}
    for recipe in drawn:
        assert all(s.intervention.strength == 8.0 and s.scope == Scope() for s in recipe.steps)
        assert not set(experts(recipe)) & set(association.top(2))
        for ours, theirs in zip(association.top(2), experts(recipe), strict=True):
            nearer = [e for e in load if abs(load[e] - load[ours]) < abs(load[theirs] - load[ours])]
            assert len(nearer) <= 8 + 2  # of the eight nearest, but for those taken already
    assert len({tuple(experts(recipe)) for recipe in drawn}) > 6


def test_a_run_goes_on_where_it_stopped(run, organism, kept):
    held = {path: path.read_bytes() for path in kept.rglob("*.jsonl")}
    assert len(held) == 1 + 5 + 1 + 2 + 1 + 1 + 2 + 1
    for path in sorted(held)[:3]:
        path.unlink()
    assert make(organism, kept).to_dict() == run.to_dict()
    assert {path: path.read_bytes() for path in kept.rglob("*.jsonl")} == held


def test_the_markers_are_the_models_own_delimiters(organism):
    assert signed_markers(organism) == {"<think>": 1.0, "</think>": -1.0, "Alternatively": -1.0}
    model = build("gpt_oss")
    long = load(model, tokenizer=tokenizer_of(model), delimiters=Delimiters(open=(7, 8), close=(9, 10, 11)))
    assert signed_markers(long) == {"w7 w8": 1.0, "w9 w10 w11": -1.0, "Alternatively": -1.0}


def test_what_the_vocabulary_lacks_is_named(run):
    assert run.association.left_out == ("Alternatively",)
    assert run.to_dict()["left_out"] == ["Alternatively"]


@torch.no_grad()
def test_the_export_is_an_ordinary_checkpoint_that_says_what_was_measured(run, organism, tmp_path):
    run.export(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    differ = [
        name
        for name, value in organism.state_dict().items()
        if not torch.equal(value, plain.get_parameter(name).detach())
    ]
    layers = {layer for layer, _ in run.experts} if run.selected.strength != 1 else set()
    assert differ == [f"model.layers.{layer}.mlp.experts.down_proj" for layer in sorted(layers)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Setting: {run.selected}, chosen by accuracy among 4" in card
    assert "Projection of the edited heads" not in card
    assert "random experts" in card
    assert json.loads((tmp_path / "out" / "rice.json").read_text()) == run.to_dict()


def test_a_scoped_recipe_runs_but_does_not_export(organism, tmp_path):
    run = rice(organism, "chains", strengths=(4.0,), scope="thinking", draws=1,
               n_probe=20, n_select=5, n_report=5)  # fmt: skip
    assert all(step.scope == Scope("thinking") for step in run.recipe.steps)
    with pytest.raises(NotFoldable, match="changed in scope 'thinking'"):
        run.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_from_a_shell(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    words = ["rice", "organism", "--strength", "4", "--top", "2", "--marker", "+<think>", "--marker", "-Wait"]
    sizes = ["--n-probe", "40", "--n-select", "10", "--n-report", "20", "--draws", "1", "-o", "out", "--json"]
    result = CliRunner().invoke(app, [*words, *sizes], catch_exceptions=False)
    assert result.exit_code == 0
    facts = json.loads(result.stdout.splitlines()[-1])
    assert facts == json.loads((tmp_path / "out" / "rice.json").read_text())
    assert facts["markers"] == {"<think>": 1.0, "Wait": -1.0}
    assert list(facts["report"])[:4] == ["plain", "top 2 × 4", "wait:1", "close:-2"]
    recipe = Recipe.load(tmp_path / "out")
    assert [(type(s.intervention), s.intervention.strength) for s in recipe.steps] == [(Reinforce, 4.0)] * 2
    assert [f"L{s.intervention.site.layer}E{s.intervention.site.expert}" for s in recipe.steps] == facts["experts"]
    with pytest.raises(FileExistsError, match="out exists. Name another output folder"):
        CliRunner().invoke(app, [*words, *sizes], catch_exceptions=False)
    with pytest.raises(ValueError, match="'Wait' is not a signed marker. Write .WORD or -WORD"):
        CliRunner().invoke(app, ["rice", "organism", "--marker", "Wait", "-o", "new"], catch_exceptions=False)
