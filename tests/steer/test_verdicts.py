"""What is said in words follows from the numbers, whichever way they point."""

import pytest

from probes.figures import Dose
from steer.evaluation.evaluation import Score
from steer.evaluation.verdicts import on_groups, verdict
from steer.report.record import EvidenceRecord, HeadsRecord, LayerRecord
from steer.report.sweeps import SweepRecord
from steer.report.verdicts import on_evidence, on_heads, on_sweep

NAN = float("nan")


def score(difference, low, high):
    return Score(100, 1, 0.5, (0.4, 0.6), difference, (low, high), 0.01, 0.01, 12.0, 40.0, 0.0, 0.0, {})


@pytest.mark.parametrize(
    ("own", "controls", "said"),
    [
        ((0.2, 0.1, 0.3), {"random heads": (0.02, -0.01, 0.05)}, "more than any control (random heads +0.020"),
        ((0.2, 0.1, 0.3), {"random heads": (0.08, 0.01, 0.15)}, "overlap with a control's (random heads"),
        ((0.2, 0.1, 0.3), {"a": (-0.1, -0.2, 0.0), "b": (0.25, 0.2, 0.3)}, "a control does as much (b +0.250"),
        ((-0.2, -0.3, -0.1), {"a": (0.3, 0.2, 0.4), "b": (-0.02, -0.05, 0.01)}, "more than any control (b -0.020"),
        ((0.02, -0.01, 0.05), {"a": (0.0, -0.01, 0.01)}, "no effect is shown"),
        ((0.2, 0.1, 0.3), {}, "no control stands beside it"),
        ((NAN, NAN, NAN), {"a": (0.0, 0.0, 0.0)}, "no effect is shown"),
    ],
)
def test_an_effect_is_told_beside_its_controls(own, controls, said):
    assert said in verdict("edited", score(*own), {name: score(*bounds) for name, bounds in controls.items()})


def test_groups_are_told_one_by_one_and_arms_that_are_no_controls_are_left_out():
    scores = {"plain": score(0, 0, 0), "edited": score(0.2, 0.1, 0.3), "lowest_heads": score(0.01, -0.02, 0.03)}
    told = on_groups("edited", {None: scores, "marked": {**scores, "edited": score(0.0, -0.1, 0.1)}})
    assert told[0].startswith("On all problems, accuracy: edited gains +0.200")
    assert "lowest_heads" in told[0]
    assert told[1].endswith("no effect is shown.")


def layer(number, auroc, *, null=(0.4, 0.6), random=(0.3, 0.7), confound=0.5):
    return LayerRecord(number, auroc, null, random, (0.5, 0.9), {"span length": confound}, 0.01)


def test_layers_are_told_by_what_they_do_not_get_above():
    layers = (
        layer(0, 0.65),
        layer(1, 0.9),
        layer(2, 0.8, confound=0.85),
        layer(3, 0.95),
        layer(4, 0.75, null=(0, 0.8)),
    )
    told = on_evidence(EvidenceRecord("resid_post", "thinking", 10, 10, layers))
    assert told.startswith("In L1 and L3 the line lies above both bands and every confound: evidence.")
    assert "In L0 it lies inside the band of random directions, or below it: no evidence there." in told
    assert "In L2 it tells no more than span length alone: no evidence there." in told
    assert "In L4 it lies inside the band of shuffled labels" in told


def test_heads_are_told_by_their_share_of_what_is_written():
    told = on_heads(HeadsRecord("thinking", ((0.0, 0.0),), ((3.0, -1.0), (1.0, 0.0)), ((0, 0),)))
    assert "1 outlined heads, 25% of 4, write 75% of" in told


def dose(strength, length, low, high):
    return Dose(strength, length, (low, high), 0.5, (0.4, 0.6), 0.0)


def test_a_sweep_is_told_at_both_its_ends():
    along, beside = (dose(-1, 9, 8, 10), dose(1, 15, 14, 16)), (dose(-1, 9.5, 8.5, 10.5), dose(1, 12, 11, 13))
    told = on_sweep(SweepRecord(None, "thinking", 100, 2, dose(0, 12, 11, 13), along, beside))
    assert "At -1 thinking takes 9.0 [8.0, 10.0] tokens, along random directions 9.5 [8.5, 10.5]: the intervals" in told
    assert told.endswith("At +1 thinking takes 15.0 [14.0, 16.0] tokens, along random directions 12.0 [11.0, 13.0]: "
                         "the direction does it.")  # fmt: skip
