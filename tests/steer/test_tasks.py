"""Published datasets, generated ones and files are tasks of one kind; a right answer is right however it is written."""

import json
import os
import random
import subprocess
import sys
from fractions import Fraction

import pytest

from probes.generation.completions import Completion
from probes.generation.sampling import Sampling
from steer.tasks import gym
from steer.tasks.answers import last_boxed, letter_of, number_of, stated
from steer.tasks.grading import is_correct
from steer.tasks.named import task_named
from steer.tasks.task import SPLITS, Problem, split_of

GOLD = {
    "gsm8k": [f"We add {i}.\n#### {a}" for i, a in enumerate(["1,234", "-5", "72", "0", "10,000,000"] * 8)],
    "math-500": [r"\frac{1}{2}", "x^2+1", r"(3, \frac{\pi}{2})", r"11\sqrt{2}", r"\boxed{27}"] * 8,
    "aime": ["025", "204", "7", "0", "999"] * 8,
    "gpqa": [f"right {i}" for i in range(40)],
}
SPLIT = {"gsm8k": "test", "math-500": "test", "aime": "train", "gpqa": "train"}


def row(name, i):
    """A row as the dataset on the hub has it, fields that are not read included."""
    if name == "gsm8k":
        return {"question": f"question {i}", "answer": GOLD[name][i]}
    if name == "gpqa":
        wrong = {f"Incorrect Answer {k}": f"wrong {i} {k}" for k in (1, 2, 3)}
        return {"Question": f"question {i}", "Correct Answer": GOLD[name][i], **wrong, "Subdomain": "Optics"}
    return {"problem": f"question {i}", "solution": "...", "answer": GOLD[name][i], "level": 5}


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Writes a copy of a dataset into a folder of its own, and names it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name, rows, split=None):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{split or SPLIT[name]}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return folder

    return write


def said(answer, stop="eos"):
    return Completion("p", 0, "", "", answer, (1,), (2,), None, stop, Sampling(), "m")


def all_of(task, seed=0):
    return [p for split in SPLITS for p in task.stream(split, seed=seed)]


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        (r"First \boxed{12}, but \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{4} and the answer is 5", "4"),
        (r"\boxed{a{b}c} then \boxed{unclosed", "a{b}c"),
        ("#### 3\n#### -1,200", "-1,200"),
        ("#### 3\nThe answer is 4.", "3"),
        ("The answer is 3.5. I checked twice.", "3.5"),
        ("the final answer is: **42**.\nDone 7", "42"),
        ("Answer: B) 7 nm", "B) 7 nm"),
        ("The answer is 1. No, the answer is 2", "2"),
        ("I get 5.", None),
        ("", None),
    ],
)
def test_what_is_stated_is_the_last_box_else_hashes_else_what_the_answer_is(text, piece):
    assert stated(text) == piece


def test_the_last_box_is_found_at_any_depth_of_braces():
    rng = random.Random(0)
    for _ in range(200):
        inner = "x"
        for _ in range(rng.randint(0, 6)):
            inner = rng.choice([f"{{{inner}}}", f"a{inner}", f"\\frac{{{inner}}}{{2}}"])
        assert last_boxed(f"\\boxed{{0}} so {{ \\boxed{{{inner}}} }}.") == inner


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", 1234), ("#### -5", -5), ("so $3.50", Fraction(7, 2)), (r"\boxed{1{,}234}", 1234),
        (r"\boxed{72 \text{ km}^2}", 72), ("The answer is 42 apples, in 3 days.", 42), ("First 3, then 4", 4),
        ("x=-7", -7), ("5-3", 3), ("It costs - $20", -20), ("3/4", Fraction(3, 4)), ("1/0", None), ("none", None),
        ("10,000,000 of 2,50", 50), (r"\boxed{025}", 25), (r"\boxed{none} 4", None),
    ],
)  # fmt: skip
def test_numbers_are_read_with_commas_signs_and_money(text, number):
    assert number_of(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{C}", "C"), (r"\boxed{\text{C}}", "C"), (r"\boxed{(C) 4 nm}", "C"), ("The answer is (B).", "B"),
        ("Answer: D", "D"), ("**Answer: B) 7 nm**", "B"), ("I weigh (A) and (C); so (C)", "C"), ("Thus\n**B**", "B"),
        ("The answer is A photon of 3 nm", None), ("A photon", None), (r"\boxed{7}", None),
        ("The answer is option D.", "D"),
    ],
)  # fmt: skip
def test_letters_are_choices_and_not_articles(text, letter):
    assert letter_of(text) == letter


@pytest.mark.parametrize(
    ("grader", "gold", "answer", "right"),
    [
        ("number", "1234", "Add up.\n#### 1,234", True),
        ("number", "-5", r"\boxed{-5}", True),
        ("number", "5", r"\boxed{-5}", False),
        ("number", "25", r"\boxed{25.0}", True),
        ("number", "25", r"\boxed{025}", True),
        ("number", "25", r"\boxed{25.5}", False),
        ("number", "25", "twenty-five", False),
        ("choice", "C", r"\boxed{C}", True),
        ("choice", "C", r"(C) is wrong: \boxed{B}", False),
        ("choice", "C", "no idea", False),
        ("math", "13", r"First \boxed{12}, but \boxed{13}.", True),
        ("math", "12", r"First \boxed{12}, but \boxed{13}.", False),
        ("math", r"(3, \frac{\pi}{2})", r"\boxed{\left(3, \frac{\pi}{2}\right)}", True),
        ("math", "12", "#### 12\nThis took 3 steps.", True),
        ("math", "12", "The answer is 12 apples.", True),
        ("math", "1/2", r"The answer is \frac{1}{2}.", True),
    ],
)
def test_an_answer_is_right_by_the_rule_of_its_task(grader, gold, answer, right):
    problem = Problem("p", "q", gold)
    assert is_correct(said(answer), problem, grader) is right
    assert not is_correct(said(answer, "length"), problem, grader)


@pytest.mark.parametrize("name", GOLD)
def test_a_local_copy_of_a_published_dataset_is_a_task(local, name):
    """Each problem comes once, in the split its question's checksum says; its own answer is right, another's is not."""
    folder = local(name, [row(name, i) for i in range(40)])
    task = task_named(name, path=folder)
    problems = all_of(task)
    assert {p.id for p in problems} == {f"question {i}" for i in range(40)}
    assert len(problems) == 40
    for split in SPLITS:
        assert {split_of(p) for p in task.stream(split)} <= {split}
    assert problems == all_of(task_named(f"{name}:{folder}")) != all_of(task, seed=1)
    answers = {p.answer for p in problems}
    for p in problems:
        assert p.question.startswith(p.id)
        assert "boxed" in p.question
        assert is_correct(said(f"So \\boxed{{{p.answer}}}."), p, task.grader)
        other = next(a for a in sorted(answers) if a != p.answer)
        assert not is_correct(said(f"\\boxed{{{other}}}"), p, task.grader)
    expected = {
        "gsm8k": {"1234", "-5", "72", "0", "10000000"},
        "aime": {"25", "204", "7", "0", "999"},
        "gpqa": set("ABCD"),
    }
    assert answers == expected.get(name, {*GOLD[name][:4], "27"})


def test_choices_are_shuffled_by_the_seed_and_the_letter_follows_the_right_one(local):
    task = task_named("gpqa", path=local("gpqa", [row("gpqa", i) for i in range(40)]))
    orders = []
    for seed in (0, 0, 1):
        problems = {p.id: p for p in all_of(task, seed)}
        for p in problems.values():
            lines = dict(line.split(") ", 1) for line in p.question.splitlines() if line[1:2] == ")")
            assert list(lines) == list("ABCD")
            assert lines[p.answer] == p.id.replace("question", "right")
            assert len(set(lines.values())) == 4
        orders.append({name: p.question for name, p in problems.items()})
    assert orders[0] == orders[1]
    assert sum(orders[0][name] != orders[2][name] for name in orders[0]) > 20


@pytest.mark.parametrize(
    ("name", "rows", "split", "sentence"),
    [
        ("gsm8k", [{"question": "q", "solution": "#### 1"}], None, "is no gsm8k: its rows lack 'answer'. They have: "),
        ("gpqa", [{"Question": "q", "Correct Answer": "a"}], None, "lack 'Incorrect Answer 1', 'Incorrect Answer 2'"),
        ("gsm8k", [], None, "gsm8k holds no problems."),
        ("gsm8k", [{"question": "q", "answer": "#### 1"}], "validation", "has no split 'test'. It has: validation."),
        ("gsm8k", [{"question": "q", "answer": "42"}], None, "Row 0 of .*gsm8k has no number after '####' in"),
        ("aime", [{"problem": "q", "answer": "1000"}], None, "Row 0 of .*aime has the answer '1000', but one of"),
    ],
)  # fmt: skip
def test_a_copy_that_is_not_the_dataset_is_refused_in_a_sentence(local, name, rows, split, sentence):
    with pytest.raises(ValueError, match=sentence):
        all_of(task_named(name, path=local(name, rows, split)))


def test_names_and_files_that_are_no_task_are_refused_in_a_sentence(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="empty.jsonl holds no problems."):
        task_named(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="Known tasks: chains, mirrors, stories, stories-minutes, gsm8k, math-500, "):
        task_named("gsm-8k")
    with pytest.raises(ValueError, match="has a folder, but 'chains' is none: gsm8k, math-500"):
        task_named("chains", path=tmp_path)
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="nowhere is not a folder. Name one that holds a copy of openai/gsm8k."):
        task_named(f"gsm8k:{tmp_path}/nowhere")


def test_a_published_dataset_comes_from_the_hub_by_its_name(monkeypatch):
    datasets, asked = pytest.importorskip("datasets"), []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return [row("gsm8k", 0)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [p.answer for p in all_of(task_named("GSM8K"))] == ["1234"]
    assert asked == [("openai/gsm8k", "main", "test")]


@pytest.mark.parametrize("name", ["chain_sum", "knights_knaves", "tower_of_hanoi", "gsm_symbolic"])
def test_a_dataset_of_reasoning_gym_is_a_task_without_end_scored_by_its_own_rule(name):
    pytest.importorskip("reasoning_gym")
    task = task_named(f"gym:{name}")
    drawn = {split: task.sample(6, split) for split in ("select", "report")}
    assert not {p.id for p in drawn["select"]} & {p.id for p in drawn["report"]}
    for split, problems in drawn.items():
        assert problems == task.sample(6, split) != task.sample(6, split, seed=1)
        assert {split_of(p) for p in problems} == {split}
        for p in problems:
            other = next(q for q in problems if q.answer != p.answer)
            for form in ("{}", "Hm.\n\\boxed{{{}}}"):
                assert is_correct(said(form.format(p.answer)), p, task.grader)
                assert not is_correct(said(form.format(other.answer)), p, task.grader)
            assert not is_correct(said(p.answer, "length"), p, task.grader)


def test_what_reasoning_gym_lacks_is_refused_and_a_small_dataset_ends(monkeypatch):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(
        ValueError, match="reasoning-gym has no dataset 'chain_sums'. It has: .*chain_sum, .*tower_of_hanoi"
    ):
        task_named("gym:chain_sums")
    with pytest.raises(ValueError, match="The problem 'p' is not of reasoning-gym, whose rules are asked to score it."):
        is_correct(said("1"), Problem("p", "q", "1"), "gym")
    entries = [{"question": f"q{i}", "answer": i} for i in range(30)]
    monkeypatch.setattr(gym, "_dataset", lambda *_: entries)
    task = task_named("gym:chain_sum")
    assert {p.id for p in all_of(task)} == {e["question"] for e in entries}
    with pytest.raises(
        ValueError, match=r"Task gym:chain_sum has \d+ problems in split 'report', but 30 were asked for."
    ):
        task.sample(30, "report")


@pytest.mark.parametrize(("name", "module"), [("gsm8k", "datasets"), ("gym:chain_sum", "reasoning_gym")])
def test_a_task_without_its_extra_says_what_to_install(monkeypatch, name, module):
    gym._known.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'thinksteer\[tasks\]'"):
        task_named(name)


def test_a_task_file_is_utf_8_whatever_the_locale_says(tmp_path):
    """A byte-order mark is no text, and U+2028 in a question ends no line; a Latin-1 locale changes nothing."""
    path = tmp_path / "t.jsonl"
    question = "Wie gro\u00df? \u2028 Juni"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"question": question, "answer": "Juni"}, ensure_ascii=False).encode()
    )
    script = "import sys; from steer import task_named; t = task_named(sys.argv[1])\n"
    script += "import random; print(ascii(next(t.problems(random.Random(0))).question))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stdout.strip() == ascii(question)


@pytest.mark.parametrize("line", ["[1, 2]", "3", '"text"', "null", "{", "\xff"])
def test_a_line_that_holds_no_keys_is_told_with_file_and_number(line, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "a"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"t\.jsonl"):
        task_named(str(path))
