"""The notebooks run from top to bottom, use public names only, and what they claim in the end holds.

Those that take a minute are run by `make slow`; that each shows what its code made is told by a checksum.
"""

import ast
import importlib
import json
from pathlib import Path

import nbformat
import plotly.io
import pytest
from execute import LARGEST, checksum
from nbconvert import HTMLExporter

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_of(path: Path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(code: str, names: dict) -> None:
    """As Jupyter does: run the statements, and show the value of a last expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        if hasattr(value, "_repr_mimebundle_"):
            value._repr_mimebundle_(None, None)
        elif hasattr(value, "_repr_html_"):
            assert value._repr_html_()


def private_imports(code: str) -> list[str]:
    """What is imported from our packages without being in an `__all__`, or in a module that is in one."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in ("probes", "steer") and "." in a.name]
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("probes", "steer"):
            public = getattr(importlib.import_module(node.module), "__all__", ())
            package, _, own = node.module.rpartition(".")
            if not package or own not in importlib.import_module(package).__all__:
                found += [f"{node.module}.{a.name}" for a in node.names if a.name not in public]
    return found


def left_behind_by(notebook: str) -> dict:
    """The names that a notebook leaves when it has run."""
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plotly.io.renderers, "default", "json")
        patch.chdir(FOLDER)
        for code in code_of(FOLDER / notebook):
            run(code, names)
    return names


@pytest.fixture(scope="module")
def thinkedit_names():
    return left_behind_by("01_thinkedit.ipynb")


@pytest.fixture(scope="module")
def steering_names():
    return left_behind_by("02_steering.ipynb")


@pytest.fixture(scope="module")
def evaluation_names():
    return left_behind_by("03_evaluation.ipynb")


@pytest.fixture(scope="module")
def expert_names():
    return left_behind_by("04_experts.ipynb")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_public_names_only(path):
    assert [name for code in code_of(path) for name in private_imports(code)] == []


@pytest.mark.parametrize(
    ("code", "private"),
    [
        ("from probes import load", []),
        ("from steer.methods.rice import rice", []),
        ("from steer.evaluation import evaluate, nulls", []),
        ("from probes.model.hooks import forward_through", ["probes.model.hooks.forward_through"]),
        ("from steer.evaluation import PLAIN", ["steer.evaluation.PLAIN"]),
        ("import steer.methods.thinkedit_run", ["steer.methods.thinkedit_run"]),
    ],
)
def test_a_private_import_is_seen(code, private):
    assert private_imports(code) == private


def draws(code: str) -> bool:
    """Is the last thing that a cell names a figure?"""
    last = ast.parse(code).body[-1]
    name = ast.unparse(last.value.func) if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) else ""
    return "figure" in name or name.startswith("px.")


def outputs_of(path: Path) -> list[list[dict]]:
    return [cell["outputs"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_outputs_of_a_notebook_are_of_its_code(path):
    """`make notebooks` writes them, with a checksum of the code that made them."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata["thinksteer"]["code"] == checksum(notebook), "run `make notebooks`"
    assert path.stat().st_size < LARGEST
    assert not any(place in path.read_text() for place in ("/tmp/", "/probes/", "/notebooks/", "site-packages"))
    assert all(output.get("name") != "stderr" for outputs in outputs_of(path) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_as_a_page_shows_every_figure(path):
    """By nbconvert: each picture that its cells put out, and as many as cells that draw one."""
    page, _ = HTMLExporter(template_name="basic").from_filename(str(path))
    drawn = sum(map(draws, code_of(path)))
    assert page.count("data:image/png;base64,") == drawn > 0


@pytest.mark.slow
def test_the_edit_lengthens_what_was_brief_and_its_control_does_not(thinkedit_names, capsys):
    run(code_of(FOLDER / "01_thinkedit.ipynb")[-1], thinkedit_names)
    evaluation = thinkedit_names["evaluation"]
    plain, edited = (evaluation.score(arm, "marked") for arm in ("plain", "edited"))
    assert f"{edited.accuracy:.0%}, the plain one in {plain.accuracy:.0%}" in capsys.readouterr().out
    assert edited.length > 1.5 * max(plain.length, evaluation.score("lowest heads", "marked").length)
    assert evaluation.score("edited").accuracy > evaluation.score("plain").accuracy


@pytest.mark.slow
def test_the_folded_model_says_what_the_recipe_said(thinkedit_names):
    before, after, again = ([c.ids for c in thinkedit_names[name]] for name in ("before", "after", "again"))
    assert again == [ids[:16] for ids in after]
    assert before != after


@pytest.mark.slow
def test_what_a_notebook_keeps_is_what_its_problems_ask(thinkedit_names):
    for path in (FOLDER / "stories").glob("*.jsonl"):
        held = list(dict.fromkeys(completion.id for completion in thinkedit_names["read_completions"](path)))
        assert held in ([p.id for p in thinkedit_names[name]][: len(held)] for name in ("problems", "report"))


@pytest.mark.slow
def test_steering_does_what_the_second_notebook_says(steering_names):
    plain, steered = (getattr(steering_names["comparison"], arm)[0] for arm in ("plain", "steered"))
    assert steered.thinking_tokens > 3 * plain.thinking_tokens
    lengths = [length for _, length, _ in steering_names["doses"]]
    assert lengths == sorted(lengths)
    assert steering_names["fired"].tokens > 0
    for set_point, length in steering_names["held"].items():
        assert length == pytest.approx(set_point, rel=0.15)
    same, moved = steering_names["same"], steering_names["moved"]
    assert steering_names["divergence"](steering_names["model"], moved, steering_names["spans"]) == pytest.approx(
        0.5, rel=0.1
    )
    assert same.steps[0].intervention.strength != moved.steps[0].intervention.strength
    touched = {name: tokens for name, tokens, _ in steering_names["touched"]}
    assert 0 < touched["its opening"] < touched["thinking"]
    twin, steered = steering_names["twin"], steering_names["steered"]
    again = steering_names["generate"](twin, steering_names["few"][:32], sampling=steering_names["brief"])
    assert [c.ids for c in again] == [c.ids for c in steered]


@pytest.mark.slow
def test_the_third_notebook_sets_one_recipe_beside_its_controls_and_baselines(evaluation_names):
    found, result, swept = (evaluation_names[name] for name in ("found", "result", "swept"))
    steered = result.score("steered")
    assert steered.difference_interval[0] > 0
    assert all(found.score(name).difference < steered.difference for name in ("random direction", "shuffled labels"))
    assert result.score("at most 40 thinking tokens").length <= 43  # and three tokens that close
    controls = ("random direction", "shuffled labels", "random direction, same KL")
    assert set(controls) <= set(swept.report.arms)
    assert all(
        swept.report.score(name).difference < swept.report.score(f"strength {swept.selected:+g}").difference
        for name in controls
    )


def test_the_weight_space_notebook_adds_what_was_learned_and_turns_the_dial():
    names = left_behind_by("05_weight_space.ipynb")
    result, dial = names["result"], names["dial"]
    assert min(result.score(name).difference_interval[0] for name in ("+ v", "+ v / 2", "+ layers")) > 0.25
    assert result.score("- v").difference_interval[1] < 0
    assert max(result.score(name).difference for name in ("+ noise", "+ layers, shuffled")) < 0.15
    assert (dial.polarity, dial.monotone) == ("longer", True)
    assert names["same"]


def test_the_fourth_notebook_counts_scores_and_reinforces_experts(expert_names, capsys):
    run(code_of(FOLDER / "04_experts.ipynb")[-1], expert_names)
    found, association = expert_names["run"], expert_names["association"]
    plain, strong = (found.report.score(arm) for arm in ("plain", "top 2 × 32"))
    assert f"from {plain.accuracy:.0%} to {strong.accuracy:.0%}" in capsys.readouterr().out
    assert strong.difference_interval[1] < -0.2
    assert association.left_out == ("Alternatively",)
    assert len(expert_names["words"]) == len(expert_names["chain"].all_ids)
    assert [c.ids for c in expert_names["said"]] == [c.ids for c in expert_names["steered"]]
    assert expert_names["counts"].load("thinking").sum(1).tolist() == pytest.approx([2.0] * 4)


@pytest.mark.slow
def test_the_sixth_notebook_scores_latents_and_asks_what_they_follow(capsys):
    names = left_behind_by("06_latents.ipynb")
    scores, told, best = (names[name] for name in ("scores", "told", "best"))
    assert str(names["sae"].site) == "L15.resid_post"
    assert set(best[:3]) <= set(scores.declared())
    assert {told.verdict(latent) for latent in best} <= {"word", "phase", "both", "neither"}
    assert names["fired"].tokens > 0
    assert f"best: latent {best[0]}, changed by" in capsys.readouterr().out


def test_the_seventh_notebook_reads_signals_and_chooses_among_samples(capsys):
    names = left_behind_by("07_signals.ipynb")
    assert len(names["correct"]) == 24
    assert names["chain"].thinking in capsys.readouterr().out
    assert names["decided"][-1]  # what is forced at the chain's end is its own answer
    assert names["way"].segments == -(-names["way"].tokens // 10)
    assert len(names["picks"]) == 4


def test_the_eighth_notebook_finds_the_heads_that_carry_a_step():
    names = left_behind_by("08_causal.ipynb")
    assert names["exact"]["L0H5.z"] > 0.9
    assert set(names["lost"].found(least=0.5)) >= {"L0H5.z", "L0H4.z"}
    assert "L0H4.z with L0H5.z" in {row[0] for row in names["pairs"].table(3).rows}


@pytest.mark.slow
def test_the_ninth_notebook_serves_recipes_side_by_side(capsys):
    names = left_behind_by("09_serving.ipynb")
    answers = names["answers"]
    assert list(answers["recipe"]) == ["plain", "longer", "shorter"] * 2
    assert (answers["thinking tokens"] > 0).all()
    assert {row["tokens"] for rows in names["fired"].values() for row in rows} == {16}
    assert "400 There is no recipe 'louder'. Known: longer, shorter." in capsys.readouterr().out
    assert names["server"].returncode == 0
