"""Scores are their definitions, intervals cover, grading is right, and no problem is in two splits."""

import json
import random
import zlib
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binom, t

import steer.tasks.chains
from probes.generation.completions import Completion
from probes.generation.sampling import Sampling
from probes.model.delimiters import ThinkingSpan
from probes.model.loading import load
from probes.model.sites import Site
from steer.decoding.budgets import Budget
from steer.evaluation._evaluate import Shared, evaluate, solve
from steer.evaluation.evaluation import SHORTEST, Evaluation
from steer.evaluation.outcomes import Outcomes
from steer.evaluation.statistics import interval_of_mean
from steer.interventions.activation import Add
from steer.recipes.recipe import Recipe
from steer.tasks.chains import TASKS, draw_chain
from steer.tasks.grading import is_correct
from steer.tasks.named import task_named
from steer.tasks.task import SPLITS, Problem, split_of

CHAINS = TASKS["chains"]
RNG = np.random.default_rng(0)


def outcomes(problems, samples, longest=9):
    """Random ones, with many ties of length."""
    shape = (problems, samples)
    return Outcomes(RNG.random(shape) < 0.5, RNG.integers(0, longest, shape), RNG.random(shape) < 0.2)


def completion(name, answer="", *, thought=3, stop="eos"):
    span = ThinkingSpan(0, 0, thought, True)
    return Completion(name, 0, "", "", answer, (1,), (2,), span, stop, Sampling(), "m")


def evaluation(**correct):
    """Arms from rows of right and wrong."""
    arms = {name: np.array(rows) for name, rows in correct.items()}
    problems = tuple(Problem(str(i), "q", "a") for i in range(len(arms["plain"])))
    return Evaluation(CHAINS, problems, {n: Outcomes(x, np.ones(x.shape, int), ~x) for n, x in arms.items()})


@pytest.mark.parametrize("n", [1, 4, 5, 19, 20, 23, 60])
def test_the_shortest_are_those_of_the_paper(n):
    """Of each run the floor(p n) completions that think least; their mean; the mean over runs."""
    own = outcomes(n, 3)
    for share in SHORTEST:
        count = int(Fraction(str(share)) * n)
        runs = []
        for run in range(3):
            order = sorted(range(n), key=lambda i: own.length[i, run])[:count]
            runs.append([(own.correct[i, run], own.length[i, run]) for i in order])
        expected = np.mean(np.mean(runs, axis=1), axis=0) if count else [np.nan, np.nan]
        np.testing.assert_allclose(own.shortest(share), expected, atol=1e-12)


@pytest.mark.parametrize("share", SHORTEST)
def test_the_share_of_the_shortest_is_rounded_down_whatever_floats_do(share):
    """The k shortest of 0, 1 ... n-1 have the mean (k-1)/2."""
    for n in range(20, 500):
        own = Outcomes(np.ones((n, 1), bool), RNG.permutation(n)[:, None], np.zeros((n, 1), bool))
        assert own.shortest(share)[1] == (int(Fraction(str(share)) * n) - 1) / 2


def test_draws_that_share_the_problems_solve_what_each_would_solve_of_them():
    model, task = load("organism"), task_named("chains")
    problems, draws = task.sample(7, "report"), [Budget(2), Budget(4), Budget(6)]
    sampling = Sampling.of(model, max_new_tokens=24)
    arms = {"shared": Shared(draws), "too many": Shared([*draws, *draws, *draws]), **{str(d): d for d in draws}}
    found = evaluate(model, task, problems, arms, sampling=sampling).arms
    for i in range(len(problems)):
        assert found["shared"].length[i] == found[str(draws[i % 3])].length[i] == found["too many"].length[i]
    with pytest.raises(ValueError, match="has no draw to pool"):
        evaluate(model, task, problems, {"none": Shared([])}, sampling=sampling)


def test_pooled_draws_are_samples_of_one_arm():
    draws = [outcomes(30, 2) for _ in range(3)]
    pooled = Outcomes.pooled(draws)
    assert pooled.correct.shape == (30, 6)
    for field in ("correct", "length", "truncated"):
        assert getattr(pooled, field).mean() == pytest.approx(np.mean([getattr(d, field).mean() for d in draws]))
    np.testing.assert_allclose(pooled.shortest(0.2), np.mean([d.shortest(0.2) for d in draws], axis=0))
    rows = np.arange(30) % 3 == 0
    assert np.array_equal(pooled.only(rows).length, pooled.length[::3])


def test_arms_are_compared_problem_by_problem():
    """Each problem gains one half, however hard it is: the difference is known exactly, accuracy is not."""
    plain = [[i % 2 == 0, False] for i in range(40)]
    better = [[i % 2 == 0, True] for i in range(40)]
    both = evaluation(plain=plain, better=better)
    score = both.score("better")
    assert (score.difference, score.difference_interval) == (0.5, (0.5, 0.5))
    assert score.interval[0] < score.accuracy == 0.75 < score.interval[1]
    assert both.score("plain").difference_interval == (0, 0)
    assert (score.n, score.samples, score.truncation) == (40, 2, 0.25)
    swapped = evaluation(plain=better, worse=plain).score("worse")
    assert swapped.difference == -0.5


def test_a_subgroup_is_scored_on_its_own_problems():
    both = evaluation(plain=[[False], [True]] * 10, better=[[True], [True]] * 5 + [[False], [False]] * 5)
    marked = tuple(replace(p, subgroup="marked" if i < 10 else None) for i, p in enumerate(both.problems))
    both = Evaluation(CHAINS, marked, both.arms)
    assert both.groups() == [None, "marked"]
    of_all, of_marked = both.score("better"), both.score("better", "marked")
    assert (of_all.n, of_all.difference, of_marked.n, of_marked.difference) == (20, 0.0, 10, 0.5)
    assert both.to_dict()["better"]["marked"]["accuracy"] == 1.0
    with pytest.raises(ValueError, match="No problem of chains is in the subgroup 'hard'."):
        both.score("plain", "hard")


def test_a_score_of_few_problems_is_strict_json_too():
    """JSON has no NaN: what two problems cannot tell is null."""
    words = evaluation(plain=[[False], [True]]).to_dict()
    assert json.loads(json.dumps(words, allow_nan=False))["plain"]["shortest"]["5%"] == [None, None]


def test_the_interval_of_a_constant_is_the_constant_and_of_one_problem_none():
    assert interval_of_mean(np.full(20, 0.3)) == pytest.approx((0.3, 0.3), abs=1e-12)
    assert np.isnan(interval_of_mean(np.array([0.3]))).all()


def test_the_interval_covers_the_mean_at_its_nominal_rate():
    """A percentile interval is mean ± 1.96 σ̂/√n with the biased σ̂, so of normal values it covers as Student's t says.

    The number of intervals that cover is then binomial; the bounds leave one chance in a thousand.
    """
    n, trials = 40, 1000
    rate = 1 - 2 * t.sf(1.96 * np.sqrt((n - 1) / n), n - 1)
    assert 0.93 < rate < 0.95
    intervals = [interval_of_mean(x) for x in RNG.normal(0.4, 1.0, (trials, n))]
    low, high = binom.interval(0.999, trials, rate)
    assert low <= sum(a <= 0.4 <= b for a, b in intervals) <= high


def test_a_truncated_completion_is_wrong_whatever_it_says():
    for grader, answer in (("exact", "4"), ("math", r"\boxed{4}")):
        problem = Problem("p", "q", "4")
        assert is_correct(completion("p", answer), problem, grader)
        assert not is_correct(completion("p", answer, stop="length"), problem, grader)
    problems = [Problem("a", "q", "4"), Problem("b", "q", "5")]
    told = [completion("b", "5", thought=7), completion("a", "4", stop="length"), completion("b", "6", thought=2)]
    own = Outcomes.of([*told, completion("a", "4", thought=1)], problems, CHAINS)
    assert own.correct.tolist() == [[False, True], [True, False]]
    assert own.length.tolist() == [[3, 1], [7, 2]]
    assert own.truncated.tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize(
    ("grader", "gold", "said", "right"),
    [
        ("exact", "4 2", "  4\n2 ", True),
        ("exact", "42", "4 2", False),
        ("exact", "1/2", "0.5", False),
        ("exact", "4", "", False),
        ("math", "1/2", "0.5", True),
        ("math", "0.5", r"So the answer is $\frac{1}{2}$.", True),
        ("math", r"\frac{1}{2}", r"We get 3, no: \boxed{0.50}", True),
        ("math", r"\boxed{12}", r"\boxed{12}", True),
        ("math", "12", r"First 12, but \boxed{13}.", False),
        ("math", "1/2", "0.25", False),
        ("math", "x+1", "$1+x$", True),
        ("math", "4", "", False),
        ("math", "4", "I do not know.", False),
    ],
)
def test_exact_is_equal_but_for_white_space_and_math_is_equal_as_mathematics(grader, gold, said, right):
    assert is_correct(completion("p", said), Problem("p", "q", gold), grader) is right


def test_no_problem_is_in_two_splits_and_a_seed_fixes_which_come():
    drawn = {split: CHAINS.sample(200, split) for split in SPLITS}
    ids = [problem.id for problems in drawn.values() for problem in problems]
    assert len(set(ids)) == len(ids) == 800
    for split, problems in drawn.items():
        assert {split_of(problem) for problem in problems} == {split}
        assert problems == CHAINS.sample(200, split)
        assert problems[:50] == CHAINS.sample(50, split)
        assert problems[:50] != CHAINS.sample(50, split, seed=1)


def test_a_split_is_a_checksum_of_the_problem_and_as_large_as_its_share():
    assert sorted(h for share in SPLITS.values() for h in share) == list(range(100))
    rng = random.Random(0)
    problems = {p.id: p for p in (draw_chain(rng) for _ in range(4000))}.values()
    for split, share in SPLITS.items():
        inside = [p for p in problems if split_of(p) == split]
        assert all(zlib.crc32(p.id.encode()) % 100 in share for p in inside)
        low, high = binom.interval(0.9999, len(problems), len(share) / 100)
        assert low <= len(inside) <= high


def test_a_chain_and_its_marked_twin_are_in_one_split(monkeypatch):
    for seed in range(100):
        twins = []
        for p_marked in (0.0, 1.0):
            monkeypatch.setattr(steer.tasks.chains, "P_MARKED", p_marked)
            twins.append(draw_chain(random.Random(seed)))
        plain, marked = twins
        assert marked == replace(plain, question=f"{plain.question} quick", subgroup="marked")
        assert plain.subgroup is None
        assert split_of(plain) == split_of(marked)


def test_the_answer_of_a_chain_is_its_value_by_ordinary_arithmetic_modulo_10_at_the_end():
    rng = random.Random(1)
    for problem in (draw_chain(rng) for _ in range(500)):
        letters, terms = (problem.question.removesuffix(" quick").split()[i::2] for i in (0, 1))
        assert letters == list("abcdefgh"[: len(terms)])
        assert 3 <= len(terms) <= 8
        value = terms[0]
        for term in terms[1:]:
            value = f"({value}) {term[0]} {term[1:]}"
        assert problem.answer == str(eval(value) % 10)


def test_a_file_of_problems_is_a_task_and_has_only_as_many_as_it_has(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{i} + 1?", "answer": i + 1}) for i in range(60)) + "\n")
    task = task_named(str(path))
    counts = {}
    for split in SPLITS:
        held = sorted(p.id for p in task.stream(split))
        counts[split] = len(held)
        assert sorted(p.id for p in task.sample(len(held), split)) == held
        sentence = f"Task sums has {len(held)} problems in split '{split}', but {len(held) + 1} were asked for."
        with pytest.raises(ValueError, match=sentence):
            task.sample(len(held) + 1, split)
    assert sum(counts.values()) == 60
    assert all(p.answer == str(int(p.question.split()[0]) + 1) for p in task.stream("train"))
    assert task.grader == "math"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            '{"question": "q", "answer": 1, "level": 5}',
            "Line 2 of .*t.jsonl has unknown keys: level. Known: question, ",
        ),
        ('{"question": "q"}', "Line 2 of .*t.jsonl lacks keys: answer."),
        ('{"question": "q", "ans', "Line 2 of .*t.jsonl"),
    ],
)
def test_a_line_that_is_no_problem_is_refused_by_its_number(line, sentence, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"question": "p", "answer": 1}\n' + line)
    with pytest.raises(ValueError, match=sentence):
        task_named(str(path))


def test_a_blank_line_is_no_problem_and_no_error(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"question": "p", "answer": 1}\n\n{"question": "q", "answer": 1}\n\n')
    assert sorted(p.id for split in SPLITS for p in task_named(str(path)).stream(split)) == ["p", "q"]


def test_an_unknown_task_is_refused_by_name():
    with pytest.raises(
        ValueError, match="'gsm9k' is neither a task nor a JSONL file. Known tasks: chains, mirrors, stories, "
    ):
        task_named("gsm9k")


def test_arms_draw_with_the_same_noise_however_they_are_given():
    """A recipe that does nothing, the model itself and its completions are the plain arm again; an edit is not."""
    model, problems = load("organism"), CHAINS.sample(12, "report")
    sampling = Sampling.of(model, max_new_tokens=CHAINS.max_new_tokens)
    told = solve(model, problems, sampling=sampling, samples=2, batch_size=5)
    nothing, edit = (
        Recipe.of(model, [Add(Site(1, "resid_post"), 9 * model.lm_head.weight[9].detach(), strength)])
        for strength in (0.0, 1.0)
    )
    arms = {"nothing": nothing, "model": model, "told": told, "edit": edit}
    found = evaluate(model, CHAINS, problems, arms, sampling=sampling, samples=2)
    own = {name: (o.correct.tolist(), o.length.tolist(), o.truncated.tolist()) for name, o in found.arms.items()}
    assert own["plain"] == own["nothing"] == own["model"] == own["told"] != own["edit"]
    assert list(found.to_frame()["arm"].unique()) == ["plain", *arms]
