"""Figures of experts hold the numbers that they are given, at the places that their axes name."""

import math

import pytest

from probes.figures.experts import doses_figure, loads_figure, scores_figure, usage_figure
from probes.figures.plots import Dose

GRID = [[0.5, -2.0, math.nan], [0.1, 0.0, 1.0]]


def test_scores_are_on_one_scale_about_zero_and_the_chosen_are_outlined_by_the_models_layer():
    figure = scores_figure({"<think>": GRID, "all": [[3.0, 0, 0], [0, 0, 0]]}, [1, 3], outlined=[(3, 2)])
    assert [list(row) for row in figure.data[0].z] == [[0.5, -2.0, None], [0.1, 0.0, 1.0]]
    assert list(figure.data[0].y) == ["1", "3"]
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-3.0, 3.0)
    assert [title.text for title in figure.layout.annotations] == ["&lt;think&gt;", "all"]
    boxes = [(box.x0, box.x1, box.y0, box.y1) for box in figure.layout.shapes]
    assert boxes == [(1.5, 2.5, 0.5, 1.5)] * 2  # expert 2, in the second row, which is layer 3


def test_loads_are_on_one_scale_from_zero():
    figure = loads_figure({"prompt": [[0.2, 0.8]], "thinking": [[0.9, 0.1]]}, [0])
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0.0, 0.9)
    assert [list(trace.z[0]) for trace in figure.data] == [[0.2, 0.8], [0.9, 0.1]]


def test_a_chain_is_drawn_token_by_token_as_text():
    figure = usage_figure([[0.0, 1.0, 0.5]], ["L0E1"], ["<bos>", "a", "</think>"], marked=[2])
    (trace,) = figure.data
    assert list(trace.z[0]) == [0.0, 1.0, 0.5]
    assert list(figure.layout.xaxis.ticktext) == ["&lt;bos&gt;", "a", "&lt;/think&gt;"]
    assert [(line.x0, line.x1) for line in figure.layout.shapes] == [(1.5, 1.5)]


def test_doses_are_in_order_of_strength_with_their_intervals_and_plain_goes_across():
    strong, weak = (Dose(s, 10 * s, (9 * s, 12 * s), 0.5, (0.4, 0.7), 0.1) for s in (64.0, 2.0))
    plain = Dose(1, 12.0, (11, 13), 0.6, (0.5, 0.7), 0.0)
    figure = doses_figure({"highest": [strong, weak], "random": [weak]}, plain=plain)
    length, accuracy = (trace for trace in figure.data if trace.name == "highest")
    assert (list(length.x), list(length.y)) == ([2.0, 64.0], [20.0, 640.0])
    assert list(length.error_y.array) == pytest.approx([4.0, 128.0])
    assert list(accuracy.error_y.arrayminus) == pytest.approx([0.1, 0.1])
    assert {shape.y0 for shape in figure.layout.shapes} == {12.0, 0.6}
    assert figure.layout.xaxis.type == figure.layout.xaxis2.type == "log"
