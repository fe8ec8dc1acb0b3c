"""A governor holds what answers to it, whatever the plant's own slope and offset."""

import random

import pytest
from closed_loop import Governor


@pytest.mark.parametrize(("slope", "offset"), [(1.0, 0.0), (0.5, 4.0), (0.9, -3.0), (1.5, 1.0)])
def test_the_mean_comes_out_at_the_set_point(slope, offset):
    rng, governor, seen = random.Random(0), Governor(12), []
    for _ in range(60):
        lengths = [round(slope * governor.aim + offset + rng.gauss(0, 6)) for _ in range(50)]
        governor.saw(lengths)
        seen.append(sum(lengths) / len(lengths))
    assert sum(seen[10:]) / 50 == pytest.approx(12, rel=0.02)


def test_what_does_not_answer_is_not_chased_without_end():
    governor = Governor(12, rate=1.0)
    for _ in range(100):
        governor.saw([40, 41])
    assert governor.aim == 3
    for _ in range(100):
        governor.saw([1])
    assert governor.aim == 48


def test_what_makes_no_sense_is_refused():
    for set_point, rate in ((0, 0.5), (12, 0), (12, 1.5)):
        with pytest.raises(ValueError, match="A governor needs a set-point above 0 and a rate above 0 and at most 1"):
            Governor(set_point, rate)
    with pytest.raises(ValueError, match="but the batch was empty"):
        Governor(12).saw([])
