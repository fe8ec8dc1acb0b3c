"""A comparison as a page: the words as they were written, what colours mean, and nothing that a text says is run."""

import re
from dataclasses import replace
from html import unescape

import pytest
import torch

from probes import Sampling, Site, load
from probes.model import tokenizer_of
from probes.model.tokens import decode
from steer import Add, Recipe, compare


@pytest.fixture(scope="module")
def compared():
    model = load("organism")
    recipe = Recipe.of(model, [Add(Site(1, "resid_post"), torch.ones(96), 0.5)])
    return compare(model, recipe, ["a 3 b +4 c *7", "a 5 b +1"], sampling=Sampling.of(model, max_new_tokens=24))


def spans(page):
    return [unescape(text) for text in re.findall(r"<span style='background:rgba[^>]*>(.*?)</span>", page, re.DOTALL)]


def test_the_words_stand_as_they_were_written(compared):
    tokenizer = tokenizer_of(load("organism"))
    told = [texts for pair in compared.tokens for texts in pair]
    sides = [c for pair in zip(compared.plain, compared.steered, strict=True) for c in pair]
    assert ["".join(texts).strip() for texts in told] == [decode(tokenizer, c.ids).strip() for c in sides]
    assert spans(compared._repr_html_()) == [text for texts in told for text in texts]


def test_words_are_not_broken_and_lines_are_kept(compared):
    other = replace(compared, tokens=((["over", "think", "\n\n", "So <b>"], []), ([], [])), projections=(([], []),) * 2)
    page = other._repr_html_()
    assert "white-space:pre-wrap" in page
    assert re.sub("<[^>]*>", "", page.partition("<td")[2].partition("</td>")[0]).partition(">")[2] == (
        "overthink\n\nSo &lt;b&gt;"
    )


def test_the_scale_is_told_in_the_colours_of_the_report(compared):
    page = compared._repr_html_()
    assert "Coloured by the projection at L1.resid_post: -" in page
    assert "linear-gradient(90deg, rgba(61,133,198,0.60)" in page
    assert "rgba(217,131,36,0.60))" in page
