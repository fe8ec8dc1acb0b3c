"""What the README prints runs as printed, and its main claim holds: the main job whole, so it is one of `make slow`."""

import json
from pathlib import Path

import pytest
from pages import ROOT, Block, blocks, run, same
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
BLOCKS = blocks((ROOT / "README.md").read_text())
PYTHON = [block for block in BLOCKS if block.kind == "python"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """All that the README runs, in its order, in an empty folder: its names, the folder, what was printed."""
    folder = tmp_path_factory.mktemp("readme")
    names: dict[str, object] = {}
    printed: list[tuple[Block, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in BLOCKS:
            printed.append((block, run(block, names)))
            for name in ("slow", "quick"):  # the files that its commands read hold the texts of its example
                if name in names:
                    lines = [json.dumps({"text": text}) + "\n" for text in names[name]]
                    Path(f"{name}.jsonl").write_text("".join(lines))
    return names, folder, printed


def test_the_main_job_is_three_lines():
    assert len(PYTHON[1].text.strip().splitlines()) == 3


def test_the_opening_example_thinks_longer_at_each_strength(page):
    """Its words may be others with another build of torch: spans, and the order of lengths, are what is claimed."""
    answers, printed = page[0]["answers"], page[2][0][1]
    lengths = [completion.thinking_tokens for completion in answers]
    assert all(completion.span is not None and completion.span.closed for completion in answers)
    assert lengths == sorted(set(lengths))
    assert printed.count("thinking tokens") == len(answers) == 4


def test_it_prints_what_it_says(page):
    _, _, printed = page
    assert sum(block.printed is not None for block, _ in printed) >= 1
    for block, got in printed:
        assert block.printed is None or same(block.printed, got), f"README, line {block.line}, prints:\n{got}"


def test_every_command_of_its_table_left_what_it_says(page):
    _, folder, printed = page
    assert sum(block.text.startswith("steer ") for block, _ in printed) >= 15
    left = ("completions.jsonl", "report.html", "d.safetensors", "swept", "swept.gguf", "back", "reinforced", "half")
    assert not [name for name in left if not (folder / name).exists()]


def test_the_edit_helps_where_its_controls_do_not(page):
    run = page[0]["run"]
    assert run.report.score("edited", "marked").difference_interval[0] > 0.2
    for control in ("random_heads", "lowest_heads", "random_direction"):
        assert abs(run.report.score(control, "marked").difference) < 0.05
    assert run.report.score("plain").n == 1000
    assert run.fold_error() < 1e-4


def test_no_reported_problem_was_selected_on(page):
    run = page[0]["run"]
    chosen_on = {problem.id for problem in run.selection.problems}
    reported_on = {problem.id for problem in run.report.problems}
    probed = {c.id for reading in run.readings.values() for c in (*reading.split.short, *reading.split.long)}
    assert not reported_on & (chosen_on | probed)


def test_the_export_loads_in_plain_transformers_and_its_card_tells(page):
    names, folder, _ = page
    AutoModelForCausalLM.from_pretrained(folder / "edited")
    card = (folder / "edited" / "README.md").read_text()
    method = names["run"].recipe.method
    for words in ("## Before and after", "## Provenance", "| random_heads |", method, "o_proj.weight"):
        assert words in card
