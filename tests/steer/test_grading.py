"""Answers are judged as a person would, whatever they are; and none takes longer than a person would wait."""

import json
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from probes import Sampling
from probes.generation.completions import Completion
from steer import task_named
from steer.tasks import SPLITS, Problem, Task, is_correct
from steer.tasks.answers import last_boxed, stated
from steer.tasks.grading import grade, grader_for
from steer.tasks.mathematics import _WORKER, equal_as_mathematics

RIGHT, WRONG = True, False
# The rule that is not given is the one that the gold answer gets.
TABLE = [
    # words
    (None, "June", "June", RIGHT),
    (None, "June", "The answer is June.", RIGHT),
    (None, "June", "june", RIGHT),
    (None, "June", r"\boxed{June}", RIGHT),
    (None, "June", r"\boxed{\text{June}}", RIGHT),
    (None, "June", "I count.\n\nJune", RIGHT),
    (None, "June", "July", WRONG),
    (None, "June", "The answer is not June.", WRONG),
    (None, "yes", "Yes.", RIGHT),
    (None, "yes", "no", WRONG),
    (None, "Marie Curie", "**Marie  Curie**", RIGHT),
    (None, "Marie Curie", "“Marie Curie”", RIGHT),
    (None, "Marie Curie", "Pierre Curie", WRONG),
    (None, "7 June 1950", "7 June 1950", RIGHT),
    (None, "7 June", "7 July", WRONG),
    (None, "Alice, Bob", "alice, bob", RIGHT),
    ("exact", "9", " 9 ", RIGHT),
    ("exact", "9", "9.", WRONG),
    ("text", "42", "The answer is 42", RIGHT),
    ("text", "42", "42.0", WRONG),
    # letters
    (None, "A", "The answer is A.", RIGHT),
    (None, "A", "(A) since it is", RIGHT),
    (None, "A", r"\boxed{A}", RIGHT),
    (None, "A", r"\boxed{\text{A}}", RIGHT),
    (None, "A", "The answer is B.", WRONG),
    (None, "(C)", "Option C: answer: C", RIGHT),
    (None, "D", "No idea", WRONG),
    (None, "D", "d", RIGHT),
    # signs and Unicode
    (None, "-5", "−5", RIGHT),
    (None, "−5", "-5", RIGHT),
    (None, "-5", r"\boxed{−5}", RIGHT),
    (None, "-5", "5", WRONG),
    (None, "5", "+5", RIGHT),
    (None, "12", "１２", RIGHT),
    (None, "½", "1/2", RIGHT),
    ("number", "-5", "It is −5", RIGHT),
    ("number", "-5", "minus five", WRONG),
    # fractions
    (None, "1/2", "0.5", RIGHT),
    (None, "1/2", r"\frac{1}{2}", RIGHT),
    (None, r"\frac{1}{2}", r"\boxed{\dfrac12}", RIGHT),
    (None, "1/3", "0.33", WRONG),
    (None, "2/4", "1/2", RIGHT),
    ("number", "3/4", "0.75", RIGHT),
    ("number", "1/0", "1/0", RIGHT),
    # percent
    (None, "50%", "50%", RIGHT),
    (None, "50%", "50 %", RIGHT),
    (None, "50%", r"\boxed{50\%}", RIGHT),
    (None, "50%", "50", RIGHT),
    (None, "50%", "5%", WRONG),
    (None, "50%", "The answer is 50 percent.", RIGHT),
    # units
    (None, "5 cm", "5 cm", RIGHT),
    (None, "5 cm", "5cm", RIGHT),
    (None, "5 cm", "5", RIGHT),
    (None, "5", "5 cm", RIGHT),
    (None, "5 cm", "5 kg", WRONG),
    (None, "5 cm", "5 centimeters", RIGHT),
    (None, "60 km/h", "60 mph", WRONG),
    (None, "5 cm", "6 cm", WRONG),
    (None, "3 apples", "3 apple", RIGHT),
    (None, "12", "The answer is 12 apples.", RIGHT),
    (None, "$3.50", "3.50", RIGHT),
    (None, "90°", r"\boxed{90}", RIGHT),
    # thousands
    (None, "1234", "1,234", RIGHT),
    (None, "1,234", "1234", RIGHT),
    (None, "1234", r"\boxed{1{,}234}", RIGHT),
    (None, "1234", r"\boxed{1\,234}", RIGHT),
    ("number", "1234", "1\u202f234", RIGHT),
    ("number", "1234", r"\boxed{1 234}", RIGHT),
    ("number", "1234", "#### 1,234", RIGHT),
    ("number", "1234", "1,235", WRONG),
    ("number", "1234567", "1,234,567", RIGHT),
    # times
    (None, "3:00", "3:00", RIGHT),
    (None, "3:00", "03:00", RIGHT),
    (None, "3:00", "The answer is 3:00.", RIGHT),
    (None, "3:00", "3:30", WRONG),
    (None, "3:00", "3", WRONG),
    (None, "10:15 pm", "10:15 PM", RIGHT),
    # TeX
    (None, r"\sqrt{2}", r"\boxed{\sqrt 2}", RIGHT),
    (None, r"2\pi", r"\boxed{2 \pi}", RIGHT),
    (None, r"x^2+1", r"\boxed{1 + x^2}", RIGHT),
    (None, r"x^2+1", r"\boxed{x^2-1}", WRONG),
    (None, "x", "x", RIGHT),
    (None, r"\infty", r"\boxed{\infty}", RIGHT),
    ("math", r"(3, \frac{\pi}{2})", r"\boxed{\left(3, \frac{\pi}{2}\right)}", RIGHT),
    # sets, intervals, tuples
    (None, r"\{1, 2, 3\}", r"\boxed{\{3, 2, 1\}}", RIGHT),
    (None, r"\{1, 2\}", r"\boxed{\{1, 3\}}", WRONG),
    (None, "[0, 1)", r"\boxed{[0, 1)}", RIGHT),
    (None, "[0, 1)", r"\boxed{[0, 1]}", WRONG),
    (None, "(1, 2)", r"\boxed{(1, 2)}", RIGHT),
    (None, "(1, 2)", r"\boxed{(2, 1)}", WRONG),
    # hostile
    ("math", "7", r"\boxed{9^{9^9}}", WRONG),
    ("math", "7", "10^10^10", WRONG),
    ("math", "7", r"\boxed{100000000!}", WRONG),
    ("math", "7", r"\boxed{" * 5_000, WRONG),
    ("math", "7", r"\boxed{" + "{" * 3_000 + "7" + "}" * 3_000 + "}", WRONG),
    ("math", "7", r"\boxed{" + "(" * 900 + "7" + ")" * 900 + "}", WRONG),
    ("math", "7", "answer is " + "* " * 500_000, WRONG),
    ("math", "7", "\n" * 1_000_000 + "7", RIGHT),
    ("choice", "A", "\n" * 1_000_000 + "(B)", WRONG),
    ("number", "7", "1," * 500_000, WRONG),
    ("number", "7", "7" * 1_000_000, WRONG),
    ("text", "7", " " * 1_000_000 + "7", RIGHT),
    ("math", "7", r"\boxed{\frac{" * 2_000, WRONG),
]  # fmt: skip


def said(answer, stop="eos"):
    return Completion("p", 0, "", None, answer, (1,), (2,), None, stop, Sampling(), "m")


@pytest.fixture(scope="module", autouse=True)
def warm():
    assert equal_as_mathematics("$1$", "1")


@pytest.mark.filterwarnings("ignore:The answer")
@pytest.mark.parametrize(("grader", "gold", "answer", "right"), TABLE)
def test_an_answer_is_judged_as_a_person_would(grader, gold, answer, right):
    problem = Problem("p", "q", gold)
    began = time.monotonic()
    assert is_correct(said(answer), problem, grader or grader_for(gold)) is right
    assert time.monotonic() - began < 2 + (_WORKER.process is None)  # what a worker's start takes is no grading
    assert not is_correct(said(answer, "length"), problem, grader or grader_for(gold))


@pytest.mark.parametrize("gold", sorted({gold for rule, gold, *_ in TABLE if rule is None}))
def test_equal_text_is_always_right(gold):
    for rule in ("exact", "text", "math", "number", "choice"):
        assert is_correct(said(gold), Problem("p", "q", gold), rule)


def test_a_stopped_grader_is_named_counts_as_wrong_and_starts_again():
    with pytest.warns(UserWarning, match=r"The answer '.+7.+9.+9.+' could not be graded within 1.5 s"):
        found = grade(said(r"\boxed{7^{9^{9}}}"), Problem("p", "q", "3"), "math")
    assert (found.correct, found.stopped) == (False, True)
    assert _WORKER.process is None
    assert grade(said(r"\boxed{\frac{9}{3}}"), Problem("p", "q", "3"), "math").correct


def test_memory_is_bounded_and_the_process_ends_with_its_parent():
    assert equal_as_mathematics("$2$", r"\boxed{1+1}")
    child = _WORKER.process
    assert child.poll() is None
    script = (
        "from steer.tasks.mathematics import _WORKER, equal_as_mathematics as e; import os\n"
        "assert e('$2$', '$1+1$'); print(_WORKER.process.pid, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text(encoding="utf-8").split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the worker outlived its parent")


def test_threads_share_one_worker():
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: equal_as_mathematics(f"${i}$", f"${i}+0$")}))
        for i in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(20), True)


def test_boxes_are_found_in_linear_time():
    assert last_boxed(r"\boxed{1} \boxed{a{b}c} \boxed{open") == "a{b}c"
    assert last_boxed(r"\boxed{\boxed{2}}") == "2"
    began = time.monotonic()
    assert last_boxed(r"\boxed{" * 200_000) is None
    assert stated("answer is " * 200_000) is not None
    assert time.monotonic() - began < 2


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_a_line_may_name_its_grader(tmp_path):
    rows = [
        {"question": "a", "answer": "June"}, {"question": "b", "answer": "A"}, {"question": "c", "answer": "1/2"},
        {"question": "d", "answer": "1/2", "grader": "text"},
    ]  # fmt: skip
    task = task_named(lines(tmp_path / "t.jsonl", rows))
    found = {p.question: p for split in SPLITS for p in task.stream(split)}
    assert {q: p.grader for q, p in found.items()} == {"a": "text", "b": "choice", "c": "math", "d": "text"}
    assert is_correct(said("0.5"), found["c"], task.grader)
    assert not is_correct(said("0.5"), found["d"], task.grader)
    bad = lines(tmp_path / "bad.jsonl", [{"question": "a", "answer": 1, "grader": "maths"}])
    with pytest.raises(ValueError, match="Line 1 of .*bad.jsonl has the grader 'maths'. Known: exact, text, math, "):
        task_named(bad)


def test_one_question_with_two_answers_is_refused(tmp_path):
    rows = [{"question": "a", "answer": 1}, {"question": "a", "answer": 1}, {"question": "a", "answer": 2}]
    with pytest.raises(ValueError, match="Line 3 of .* asks 'a' again, with another answer"):
        task_named(lines(tmp_path / "t.jsonl", rows))
    task = task_named(lines(tmp_path / "t.jsonl", rows[:2]))
    assert sum(len(list(task.stream(split))) for split in SPLITS) == 1


@pytest.mark.parametrize("n", [1, 3, 4, 5, 10, 33, 300])
def test_splits_are_shares_of_what_is_there(n, tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": i + 1} for i in range(n)]
    task = task_named(lines(tmp_path / "t.jsonl", rows))
    held = {split: {p.id for p in task.stream(split)} for split in SPLITS}
    sizes = [len(ids) for ids in held.values()]
    assert sum(sizes) == len(set().union(*held.values())) == n
    if n >= 4:
        assert min(sizes) >= 1
        assert all(abs(size - n * len(share) / 100) <= 2 for size, share in zip(sizes, SPLITS.values(), strict=True))
    random.Random(0).shuffle(rows)
    again = task_named(lines(tmp_path / "t.jsonl", rows))
    assert {split: {p.id for p in again.stream(split)} for split in SPLITS} == held


def test_a_task_that_holds_fewer_than_are_asked_for_says_so():
    def two(rng):
        while True:
            yield Problem(str(rng.randrange(2)), "q", "a")

    with pytest.raises(ValueError, match="Task two has [0-2] problems in split 'train', but 3 were asked for"):
        Task("two", "exact", two).sample(3, "train")
    for n in (0, -5):
        with pytest.raises(ValueError, match=f"{n} problems were asked for, but at least 1 is needed"):
            task_named("chains").sample(n, "report")


def test_a_grade_says_nothing_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert grade(said("9"), Problem("p", "q", "9"), "math").correct
