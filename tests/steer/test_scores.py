"""Scores are what the paper defines, intervals cover as they promise, splits share nothing, and answers are right."""

import json
from itertools import islice

import numpy as np
import pytest

from probes.completions import Completion
from probes.sampling import Sampling
from steer.grading import is_correct
from steer.scores import Evaluation, Outcomes, interval_of_mean
from steer.tasks import SPLITS, Problem, Task, split_of, task_named

RNG = np.random.default_rng(0)


def outcomes(correct, length, truncated=None):
    correct, length = np.asarray(correct), np.asarray(length)
    return Outcomes(correct, length, np.zeros_like(correct) if truncated is None else np.asarray(truncated))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_the_shortest_are_taken_within_each_run_and_averaged_over_runs(share):
    """ThinkEdit: sort a run by thinking length, take the first floor(p n), average, then average over the runs."""
    length, correct = RNG.permuted(np.arange(63 * 4).reshape(63, 4), axis=0), RNG.random((63, 4)) < 0.5
    accuracies, lengths = [], []
    for run in range(4):
        first = sorted(range(63), key=lambda i: length[i, run])[: int(share * 63)]
        accuracies.append(sum(correct[i, run] for i in first) / len(first))
        lengths.append(sum(length[i, run] for i in first) / len(first))
    got = outcomes(correct, length).shortest(share)
    assert got == (pytest.approx(np.mean(accuracies)), pytest.approx(np.mean(lengths)))
    assert np.isnan(outcomes(correct[:4], length[:4]).shortest(share)[0])


def test_a_difference_is_paired_by_problem_and_a_subgroup_is_its_problems():
    problems = tuple(Problem(str(i), "", "", "marked" if i % 3 == 0 else None) for i in range(90))
    task = Task("t", "exact", lambda _: iter(()), "marked")
    plain = RNG.random((90, 1)) < 0.5
    better = plain | (np.arange(90)[:, None] % 3 == 0)
    evaluation = Evaluation(task, problems, {"plain": outcomes(plain, plain + 5), "other": outcomes(better, plain + 7)})
    score, marked = evaluation.score("other"), evaluation.score("other", "marked")
    assert score.difference == pytest.approx(float((better.astype(float) - plain).mean()))
    assert (marked.n, marked.accuracy, marked.interval) == (30, 1.0, (1.0, 1.0))
    assert evaluation.score("plain").difference_interval == (0.0, 0.0)
    assert evaluation.to_json()["other"]["marked"]["n"] == 30
    assert len(evaluation.table().rows) == 4
    with pytest.raises(ValueError, match="No problem of t is in the subgroup 'easy'"):
        evaluation.score("other", "easy")


def test_pooled_draws_are_samples_of_one_arm():
    a, b = (outcomes(RNG.random((8, 2)) < 0.5, RNG.integers(0, 9, (8, 2))) for _ in range(2))
    pooled = Outcomes.pooled([a, b])
    assert pooled.correct.shape == (8, 4)
    assert pooled.length.mean() == pytest.approx((a.length.mean() + b.length.mean()) / 2)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """95 % nominal, 200 simulations: fewer than 179 hits would happen with a chance below 1e-4 at 95 %."""
    hits = 0
    for seed in range(200):
        low, high = interval_of_mean((np.random.default_rng(seed).random(120) < 0.3).astype(float))
        hits += low <= 0.3 <= high
    assert 179 <= hits < 200
    assert interval_of_mean(np.full(9, 0.25)) == (0.25, 0.25)


def completion(answer, stop="eos"):
    return Completion("0", 0, "", "", answer, (1,), (2,), None, stop, Sampling(), "m")


@pytest.mark.parametrize(
    ("answer", "gold", "grader", "right"),
    [
        ("7", "7", "exact", True), (" 7\n", "7", "exact", True), ("17", "7", "exact", False),
        ("The answer is \\boxed{\\frac{1}{2}}.", "0.5", "math", True), ("it is 1,080", "1080", "math", True),
        ("\\boxed{3}", "4", "math", False), ("", "4", "math", False), ("is 12.", "12", "math", True),
    ],
)  # fmt: skip
def test_grading(answer, gold, grader, right):
    problem = Problem("0", "", gold)
    assert is_correct(completion(answer), problem, grader) == right
    assert not is_correct(completion(answer, stop="length"), problem, grader)


def test_splits_share_no_problem_and_stay_as_they_are():
    task = task_named("chains")
    drawn = {split: {p.id for p in task.sample(300, split, seed=1)} for split in SPLITS}
    assert all(len(ids) == 300 for ids in drawn.values())
    assert sum(map(len, drawn.values())) == len(set().union(*drawn.values()))
    assert [p.id for p in task.sample(50, "report")] == [p.id for p in task.sample(50, "report")]
    assert sorted(i for share in SPLITS.values() for i in share) == list(range(100))
    assert split_of(Problem("a 1 b +1", "x", "2")) == split_of(Problem("a 1 b +1", "x quick", "2", "marked"))


def test_the_answers_of_the_chains_are_right():
    rules = {"+": lambda x, k: x + k, "-": lambda x, k: x - k, "*": lambda x, k: x * k}
    marked = 0
    problems = list(islice(task_named("chains").stream("report"), 500))
    for problem in problems:
        terms = problem.question.removesuffix(" quick").split()[1::2]
        value = int(terms[0])
        for term in terms[1:]:
            value = rules[term[0]](value, int(term[1:])) % 10
        assert (str(value), 3 <= len(terms) <= 8) == (problem.answer, True)
        assert problem.question.endswith(" quick") == (problem.subgroup == "marked")
        marked += problem.subgroup == "marked"
    assert 0.25 < marked / 500 < 0.45  # 35 %, more than four standard errors to either side


def test_a_file_of_problems_is_a_task(tmp_path):
    path = tmp_path / "sums.jsonl"
    lines = [json.dumps({"question": f"{i} + 1?", "answer": i + 1}) for i in range(200)]
    path.write_text("\n".join(lines))
    task = task_named(str(path))
    found = task.sample(10, "report", seed=3)
    assert [p.answer for p in found] == [str(int(p.question.split()[0]) + 1) for p in found]
    with pytest.raises(ValueError, match=r"Task sums has \d+ problems in split 'report', but 200 were asked for"):
        task.sample(200, "report")
    path.write_text('{"question": "1 + 1?", "answer": 2, "hint": 1}')
    with pytest.raises(ValueError, match="Line 1 of .* has unknown keys: hint. Known: question, answer"):
        task_named(str(path))
    with pytest.raises(ValueError, match="'gsm' is neither a task nor a JSONL file. Known tasks: chains"):
        task_named("gsm")
