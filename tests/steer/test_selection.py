"""A choice in rounds: what goes on, on which problems, and that nothing is solved twice."""

from dataclasses import replace

import pytest

from probes import Sampling, load
from steer import evaluate, task_named
from steer.decoding import Budget
from steer.evaluation import select, selection, solve
from steer.evaluation.selection import n_solved, schedule

TASK = task_named("chains")
N = 64
PROBLEMS = TASK.sample(N, "select")
SAMPLING = Sampling(max_new_tokens=48)


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def plain(organism):
    return solve(organism, PROBLEMS, sampling=SAMPLING)


@pytest.fixture
def arms(plain):
    """Nine arms, of each 16 problems so many right; 8 and 2 are of a kind of their own."""

    def made(right):
        return [
            replace(c, answer=p.answer if i % 16 < right else "none")
            for i, (c, p) in enumerate(zip(plain, PROBLEMS, strict=True))
        ]

    return {str(right): made(right) for right in (4, 14, 8, 2, 15, 6, 12, 10, 1)}


def test_a_third_goes_on_and_the_best_are_ranked(organism, arms):
    found = select(organism, TASK, PROBLEMS, arms, sampling=SAMPLING)
    rounds = [(sorted(set(r.arms) - {"plain"}), r.problems) for r in found.rounds]
    assert rounds == [(sorted(arms), tuple(PROBLEMS[:32])), (["12", "14", "15"], tuple(PROBLEMS))]
    assert found.best() == ["15", "14", "12"]
    assert found.n_settings == 9
    assert [(found.score(arm).n, found.score(arm).accuracy) for arm in ("1", "15")] == [(32, 1 / 16), (64, 15 / 16)]
    assert [row[:2] for row in found.table().rows[:3]] == [("plain", 64), ("4", 32), ("14", 64)]


def test_the_best_of_every_kind_goes_on(organism, arms):
    kinds = {arm: "few" if int(arm) < 3 else "middling" if int(arm) < 9 else "many" for arm in arms}
    last = select(organism, TASK, PROBLEMS, arms, kinds=kinds, sampling=SAMPLING).rounds[-1]
    assert set(last.arms) == {"plain", "15", "8", "2"}


def test_of_equals_the_first_is_taken(organism, plain):
    same = {name: plain for name in "edcba"}
    assert select(organism, TASK, PROBLEMS, same, sampling=SAMPLING).best() == ["e", "d"]


def test_what_is_left_is_compared_as_evaluate_compares(organism, tmp_path):
    budgets = {f"budget {n}": Budget(n) for n in (2, 4, 8, 16, 32, 40)}
    found = select(organism, TASK, PROBLEMS, budgets, sampling=SAMPLING, store=tmp_path)
    whole = evaluate(organism, TASK, PROBLEMS, budgets, sampling=SAMPLING)
    for arm in found.rounds[-1].arms:
        assert found.last(arm).arms[arm].correct.tolist() == whole.arms[arm].correct.tolist(), arm
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    again = select(organism, TASK, PROBLEMS, budgets, sampling=SAMPLING, store=tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == kept
    assert again.table() == found.table()


@pytest.mark.parametrize("problems", [1, 2, 15, 31, 32, 63, 120, 400])
@pytest.mark.parametrize("arms", [1, 4, 5, 12, 36, 100])
def test_rounds_end_with_few_arms_and_all_problems(arms, problems):
    plan = schedule(arms, problems, n_kinds=3)
    assert plan[0][0] == arms
    assert plan[-1][1] == problems
    assert all(a > b and m < n for (a, m), (b, n) in zip(plan, plan[1:], strict=False))
    assert len(plan) == 1 or plan[0][1] >= selection.LEAST
    assert n_solved(arms, problems, n_kinds=3) <= (arms + 1) * problems


def test_as_many_problems_are_solved_as_was_said(organism, monkeypatch):
    solved = []

    def counted(*args, **kwargs):
        solved.append(len(args[4]))
        return original(*args, **kwargs)

    original = selection.solve_with
    monkeypatch.setattr(selection, "solve_with", counted)
    budgets = {f"budget {n}": Budget(n) for n in range(2, 9)}
    select(organism, TASK, PROBLEMS, budgets, sampling=SAMPLING)
    assert sum(solved) == n_solved(7, N) < 8 * N


def test_there_must_be_something_to_choose_from(organism):
    with pytest.raises(ValueError, match="no arm to choose from"):
        select(organism, TASK, PROBLEMS, {}, sampling=SAMPLING)
