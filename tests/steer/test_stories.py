"""Stories add up, as somebody who only reads them finds."""

import random
import re
from collections import Counter

import pytest

from steer import task_named
from steer.tasks import SPLITS, draw_story, split_of
from steer.tasks.stories import CUES, DOMAINS, LEAST, MOST

# What a sentence does to an amount, told by its verb alone: nothing of how it was made.
READ = (
    (r"(\d+) boxes with (\d+) .* each", lambda a, n: a + n[0] * n[1]),
    (r"sells (\d+) toys for (\d+)", lambda a, n: a + n[0] * n[1]),
    (r"buys (\d+) tickets for (\d+)", lambda a, n: a - n[0] * n[1]),
    (r"(\d+) red lights cost (\d+)", lambda a, n: a + n[0] * n[1]),
    (r"(?:gives (\d+) .* to|loses (\d+)|spends (\d+)|saves (\d+))", lambda a, n: a - n[0]),
    (r"(?:finds (\d+) more|gives \w+ (\d+)|earns (\d+)|note of (\d+)|adds (\d+))", lambda a, n: a + n[0]),
    (r"doubles|twice as long", lambda a, _: 2 * a),
    (r"triples", lambda a, _: 3 * a),
    (r"half", lambda a, _: a / 2),
)
IRRELEVANT = r"years old|degrees|bus number|lives at|opens at"


def read(story):
    """The amounts of a story, one after another."""
    for cue in CUES:
        story = story.removeprefix(cue)
    first, *rest = story.split(". ")
    amounts = [int(re.search(r"\d+", first).group())]
    for sentence in rest[:-1]:
        if re.search(IRRELEVANT, sentence):
            continue
        change, found = next((c, m) for p, c in READ if (m := re.search(p, sentence)))
        amounts.append(change(amounts[-1], [int(n) for n in found.groups() if n]))
    return amounts


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_answer_is_what_a_reader_finds(domain):
    rng = random.Random(domain)
    for problem in (draw_story(rng, domain) for _ in range(1500)):
        amounts = read(problem.question)
        assert amounts[-1] == int(problem.answer)
        assert all(LEAST <= amount <= MOST and amount == int(amount) for amount in amounts)
        assert 3 <= len(amounts) <= 6
        assert problem.question.endswith(problem.id)
        assert (problem.subgroup == "marked") == problem.question.startswith(CUES)


def test_a_third_is_marked_and_a_marked_twin_is_in_the_same_split():
    rng = random.Random(0)
    drawn = [draw_story(rng) for _ in range(3000)]
    assert 0.32 < sum(p.subgroup == "marked" for p in drawn) / 3000 < 0.38
    assert len({p.id for p in drawn}) > 2990
    assert Counter(split_of(p) for p in drawn).keys() == set(SPLITS)
    assert draw_story(random.Random(5)) == draw_story(random.Random(5))


def test_the_tasks_share_no_problem_and_know_their_subgroup():
    tasks = [task_named(name) for name in ("stories", "stories-minutes")]
    ids = [{p.id for split in SPLITS for p in task.sample(100, split)} for task in tasks]
    assert not ids[0] & ids[1]
    assert [len(found) for found in ids] == [400, 400]
    assert all(task.grader == "number" and task.subgroup == "marked" for task in tasks)
    assert all("minutes" in problem for problem in ids[1])
    assert any("dollars" in problem for problem in ids[0])
    with pytest.raises(ValueError, match="'miles' is no domain of stories. Known: counts, money, minutes"):
        draw_story(random.Random(0), "miles")
