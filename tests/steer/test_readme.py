"""What the README prints runs as printed, and its main claim holds."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    """The three lines, run in an empty folder: their names, and the folder."""
    folder = tmp_path_factory.mktemp("readme")
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(BLOCKS[0], names)
    return names["run"], folder


def test_the_main_job_is_three_lines():
    assert len(BLOCKS[0].strip().splitlines()) == 3


def test_the_edit_helps_where_its_controls_do_not(main_job):
    run, _ = main_job
    assert run.report.score("edited", "marked").difference_interval[0] > 0.2
    for control in ("random_heads", "lowest_heads", "random_direction"):
        assert abs(run.report.score(control, "marked").difference) < 0.05
    assert run.report.score("plain").n == 1000
    assert run.fold_error() < 1e-4


def test_no_reported_problem_was_selected_on(main_job):
    run, _ = main_job
    chosen_on = {problem.id for problem in run.selection.problems}
    reported_on = {problem.id for problem in run.report.problems}
    probed = {c.id for reading in run.readings.values() for c in (*reading.split.short, *reading.split.long)}
    assert not reported_on & (chosen_on | probed)


def test_the_export_loads_in_plain_transformers_and_its_card_tells(main_job):
    run, folder = main_job
    AutoModelForCausalLM.from_pretrained(folder / "edited")
    card = (folder / "edited" / "README.md").read_text()
    for words in ("## Before and after", "## Provenance", "| random_heads |", run.recipe.method, "o_proj.weight"):
        assert words in card


def test_the_other_examples_run():
    names = {}
    for block in BLOCKS[1:]:
        exec(block, names)
    assert len(names["completions"]) == 1
