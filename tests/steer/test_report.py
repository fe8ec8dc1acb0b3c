"""The report shows what its record holds, fetches nothing, runs nothing that a record says, and draws in a browser."""

import copy
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browser import BOXES, browsed, overlaps
from devtools import browsing

from probes.evidence._separation import project
from probes.figures.plots import Dose, Point, arms_figure, evidence_figure, heads_figure, sweep_figure
from probes.model.loading import tokenizer_of
from probes.thinking.spans import Span
from steer.methods.thinkedit import ThinkEditSetting
from steer.methods.thinkedit_run import thinkedit
from steer.report.html import shade, token_span
from steer.report.record import RunRecord
from steer.report.saved import write_report
from steer.report.thinkedit import render

HOSTILE = '</script><script>document.documentElement.dataset.taken = 1</script><img src=x onerror="alert(1)">\'"&'


@pytest.fixture(scope="module")
def run():
    settings = [ThinkEditSetting("project"), ThinkEditSetting("replace", "first", "raw", 2)]
    return thinkedit(
        "organism", settings=settings, n_probe=300, n_select=60, n_report=120, control_draws=1, batch_size=256
    )


@pytest.fixture(scope="module")
def words(run):
    """The record, as it comes back from its file."""
    short = {"strengths": (-0.08, 0.08), "layer_strengths": (-0.1, 0.1)}
    return json.loads(
        json.dumps(
            RunRecord.of(run, n=60, draws=1, batch_size=256, command="steer demo", **short).to_dict(), allow_nan=False
        )
    )


@pytest.fixture
def hostile(words):
    """The record with a script wherever a record holds words."""
    bad = copy.deepcopy(words)
    bad["edit"]["setting"] = bad["edit"]["heads"][0] = bad["provenance"]["command"] = HOSTILE
    bad["provenance"]["model"]["name"] = bad["provenance"]["splits"]["probe"] = HOSTILE
    bad["arms"]["report"][HOSTILE] = bad["arms"]["report"]["edited"]
    bad["arms"]["selection"][HOSTILE] = bad["arms"]["selection"]["plain"]
    for layer in bad["evidence"]["layers"]:
        layer["confounds"][HOSTILE] = 0.5
    for example in bad["completions"]["examples"]:
        example["kind"] = example["problem"] = example["answer"] = HOSTILE
        example["plain"]["tokens"][-1] = HOSTILE
    return bad


class Page(HTMLParser):
    """Tags with their attributes, the texts of scripts, and the rows of the arms table."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.rows, self.inside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.inside.append((tag, dict(attributes).get("id")))
        if ("div", "arms-table") in self.inside and tag in ("tr", "td"):
            self.rows.append([]) if tag == "tr" else self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.inside.pop()[0] == tag

    def handle_data(self, data):
        if self.inside and self.inside[-1][0] == "script":
            self.scripts.append(data)
        elif self.inside and self.inside[-1][0] == "td" and ("div", "arms-table") in self.inside:
            self.rows[-1][-1] += data


def numbers(cells):
    """Every number in cells, shares as parts of one, each with half a unit of its last digit."""
    for text in re.findall(r"[+-]?\d+(?:\.\d+)?%?", " ".join(cells).replace("−", "-")):
        digits = text.rstrip("%")
        scale = 100 if text.endswith("%") else 1
        places = len(digits.partition(".")[2])
        yield float(digits) / scale, 0.5001 * 10**-places / scale


def test_the_page_refers_to_nothing_outside_itself(words):
    page = Page(render(words))
    assert not [attributes for _, attributes in page.tags if "src" in attributes or "srcset" in attributes]
    assert all(attributes["href"].startswith("#") for _, attributes in page.tags if "href" in attributes)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "img", "base", "form"}
    policies = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert [policy.split(";")[0] for policy in policies] == ["default-src 'none'"]
    style = (Path(__file__).parents[2] / "steer" / "report" / "report.css").read_text()
    assert "url(" not in style
    assert "@import" not in style
    assert "</style" not in style


def test_without_sweeps_the_page_says_so(words):
    assert "No sweep was asked for." in render({**words, "sweeps": []})
    assert "No sweep was asked for." not in render(words)


def test_every_number_in_the_arms_table_is_the_records(words):
    arms = words["arms"]["report"]
    rows = [row for row in Page(render(words)).rows if row]
    assert len(rows) == 2 * len(arms)
    for arm, group, *cells in rows:
        score = arms[arm] if group == "all" else arms[arm][group]
        paired = [] if arm == "plain" else [score["difference"], *score["difference_interval"]]
        short = [value for pair in score["shortest"].values() for value in pair]
        basic = [score["n"], score["samples"], score["accuracy"], *score["interval"]]
        expected = [*basic, *paired, score["length"], score["truncation"], *short]
        shown = list(numbers(cells))
        assert len(shown) == len([value for value in expected if value is not None])
        for (value, half), truth in zip(shown, (v for v in expected if v is not None), strict=True):
            assert abs(value - truth) <= half


def test_the_record_is_the_runs(run, words):
    assert words["arms"]["report"]["edited"]["accuracy"] == run.report.score("edited").accuracy
    assert words["heads"]["raw"] == run.readings[run.selected.position].scores("raw").scores.tolist()
    assert words["heads"]["edited"] == [list(head) for head in run.heads]
    assert len(words["evidence"]["layers"]) == 4
    for sweep in words["sweeps"]:
        assert sweep["plain"]["accuracy"] == run.selection.score("plain").accuracy
    below, above = (dose["length"] for dose in words["sweeps"][0]["direction"])
    assert below < words["sweeps"][0]["plain"]["length"] < above
    for random in words["sweeps"][0]["random"]:
        assert below < random["length"] < above


def test_examples_are_the_first_of_their_kind_and_their_projections_are_the_probes(run, words):
    before, after = (run.report.arms[arm].correct[:, 0] for arm in ("plain", "edited"))
    kinds = [example["kind"].split(":")[0] for example in words["completions"]["examples"]]
    assert kinds == ["repaired", "unchanged", "not repaired"]
    repaired = words["completions"]["examples"][0]
    first = next(p for p, a, b in zip(run.report.problems, before, after, strict=True) if p.subgroup and b > a)
    assert (repaired["problem"], repaired["answer"]) == (first.question, first.answer)
    assert (repaired["plain"]["correct"], repaired["edited"]["correct"]) == (False, True)
    side = repaired["plain"]
    start, stop = side["read"]
    ids = tuple(tokenizer_of(run.model).convert_tokens_to_ids(side["tokens"]))
    seen = float(project(run.model, [Span(ids, start, stop)], [run.direction])) - words["completions"]["midpoint"]
    assert sum(side["projections"][start:stop]) / (stop - start) == pytest.approx(seen, abs=1e-3)
    for other in words["completions"]["examples"]:
        for side in (other["plain"], other["edited"]):
            assert len(side["tokens"]) == len(side["projections"])


def test_hostile_text_is_inert(words, hostile):
    honest, page = Page(render(words)), Page(render(hostile))
    count = lambda p: {tag: sum(t == tag for t, _ in p.tags) for tag in ("script", "img")}  # noqa: E731
    assert count(page) == count(honest)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    drawn = [a for tag, a in page.tags if tag == "script"]
    data = [text for text, a in zip(page.scripts, drawn, strict=True) if a.get("type") == "application/json"]
    assert len(data) == 6
    for text in data:
        assert "<" not in text
        json.loads(text)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.update(extra=1), "The record has unknown keys: extra. Known: format, "),
        (lambda w: w.pop("heads"), "The record lacks keys: heads."),
        (lambda w: w.update(format="2"), "The record has format '2', and this version reads 'thinksteer run 1'."),
        (lambda w: w["edit"].update(new=1), "The part 'edit' of the record has unknown keys: new."),
        (lambda w: w.update(edit=3), "The part 'edit' of the record should hold keys, but is 3."),
        (lambda w: w.update(sweeps=3), "The record's sweeps should be a list, but is 3."),
        (lambda w: w["sweeps"][1].pop("plain"), "Sweep 1 of the record lacks keys: plain."),
        (lambda w: w["sweeps"][0]["random"][0].pop("length"), "A dose in sweep 0 of the record lacks keys: length."),
        (lambda w: w["evidence"]["layers"][2].update(x=1), "Layer 2 in the record's evidence has unknown keys: x."),
        (lambda w: w["arms"]["report"].pop("edited"), "The record's report has no arm 'edited'."),
        (lambda w: w["arms"]["report"]["plain"].update(x=1), "The arm 'plain' of the record's report has unknown"),
        (lambda w: w["completions"]["examples"][0]["plain"].pop("tokens"), "The plain side of example 0 of the record"),
        (lambda w: w["arms"]["report"]["plain"].update(accuracy="<b>"), "The record does not hold what its keys"),
    ],
)
def test_what_is_unknown_missing_or_of_another_kind_is_refused_in_a_sentence(words, change, sentence):
    bad = copy.deepcopy(words)
    change(bad)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        render(bad)


def test_a_record_comes_back_as_it_was_written_also_where_a_split_holds_no_marked_problem(words):
    assert RunRecord.from_dict(words).to_dict() == words
    fewer = copy.deepcopy(words)
    for score in fewer["arms"]["selection"].values():
        del score[fewer["arms"]["subgroup"]]
    assert RunRecord.from_dict(fewer).to_dict() == fewer
    assert render(fewer) == render(words)
    del fewer["arms"]["report"]["edited"][fewer["arms"]["subgroup"]]
    with pytest.raises(ValueError, match="This arm has no score of 'marked' problems"):
        render(fewer)


def test_a_folder_is_read_and_written_whole_or_refused(words, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run.json: give the folder of an exported run."):
        write_report(tmp_path, tmp_path / "report.html")
    for text, sentence in (("{", "is not JSON"), ("[]", "is not a record of a run")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "run.json").write_text(json.dumps(words))
    assert write_report(tmp_path, tmp_path / "report.html").read_text() == render(words)


def test_colouring_is_monotone_and_symmetric():
    values = torch.linspace(-3, 3, 61).tolist()
    shades = [shade(value, 2.0) for value in values]
    assert shades == sorted(shades)
    assert len(set(shades)) == 41  # between -scale and +scale each its own
    assert (shades[0], shades[30], shades[-1]) == (-1, pytest.approx(0, abs=1e-6), 1)
    for value, mirrored in zip(values, reversed(values), strict=True):
        assert shade(value, 2.0) == pytest.approx(-shade(mirrored, 2.0), abs=1e-6)
        ours, theirs = token_span("a", value, 2.0, False, False), token_span("a", mirrored, 2.0, False, False)
        assert re.findall(r"--shade:([\d.]+)", ours) == re.findall(r"--shade:([\d.]+)", theirs)
        if abs(value) > 1e-3:
            assert ("towards-long" in ours) == (value > 0) == ("towards-short" in theirs)
    assert shade(5.0, 0.0) == 0


def test_figures_hold_the_data_they_are_given():
    bands = {"null": [(0.4, 0.6), (0.3, 0.7)], "random": [(0.2, 0.8), (0.1, 0.9)]}
    figure = evidence_figure([0, 1], [0.9, 0.8], confounds={"prompt length": [0.5, 0.6]}, **bands)
    named = {trace.name: trace for trace in figure.data}
    assert (named["direction"].x, named["direction"].y) == ((0, 1), (0.9, 0.8))
    assert named["prompt length"].y == (0.5, 0.6)
    assert named["shuffled labels"].x == (0, 1, 1, 0)
    assert named["shuffled labels"].y == (0.6, 0.7, 0.3, 0.4)
    assert named["random directions"].y == (0.8, 0.9, 0.1, 0.2)

    scores = [[0.1, -2.0, 0.3], [0.0, 0.5, 1.0]]
    figure = heads_figure(scores, edited=[(1, 2)])
    assert [list(row) for row in figure.data[0].z] == scores
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-2.0, 2.0)
    box = figure.layout.shapes[0]
    assert (box.x0, box.x1, box.y0, box.y1) == (1.5, 2.5, 0.5, 1.5)

    points = [Point("plain", 12.0, 0.5, (0.4, 0.7)), Point("edited", 15.0, 0.8, (None, None), "marked <b>")]
    figure = arms_figure(points)
    drawn = {(t.x, t.y): t for t in figure.data if t.x}
    assert drawn[(12.0,), (0.5,)].error_y.array == pytest.approx((0.2,))
    assert drawn[(12.0,), (0.5,)].error_y.arrayminus == pytest.approx((0.1,))
    assert drawn[(15.0,), (0.8,)].error_y.array == (0,)
    assert "&lt;b&gt;" in figure.layout.xaxis.title.text

    doses = [Dose(s, 10 + s, (9 + s, 12 + s), 0.5 + s / 10, (0.4, 0.9), 0.1) for s in (-1.0, 0.0, 1.0)]
    figure = sweep_figure(doses, doses[1:])
    assert [trace.x for trace in figure.data] == [(0.0, 1.0)] * 2 + [(-1.0, 0.0, 1.0)] * 2
    assert [trace.y for trace in figure.data[2:]] == [(9.0, 10.0, 11.0), (0.4, 0.5, 0.6)]
    assert figure.data[2].error_y.array == (2, 2, 2)
    assert figure.data[2].error_y.arrayminus == (1, 1, 1)
    for made in (figure, heads_figure(scores)):
        assert made.layout.paper_bgcolor == made.layout.plot_bgcolor == "rgba(0,0,0,0)"


@pytest.mark.parametrize("kind", ["words", "hostile"])
def test_a_browser_draws_every_figure_without_an_error(kind, request, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(render(request.getfixturevalue(kind)))
    dom, log = browsed(page, tmp_path / "profile")
    assert re.search(r"<html[^>]* data-errors=\"0\"", dom), log
    assert "data-taken" not in dom.partition("<head")[0]
    assert "CONSOLE" not in log
    plots = dom.split('<div class="plot js-plotly-plot"')[1:]
    assert len(plots) == 6
    for plot in plots:
        assert 'class="main-svg"' in plot
        assert "trace" in plot or "<image" in plot


@pytest.mark.parametrize("width", [900, 1600])
def test_the_page_fits_its_width_and_no_labels_of_its_figures_overlap(words, width, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(render(words))
    with browsing(tmp_path / "profile", size=(width, 1000)) as tab:
        tab.call("Page.navigate", url=page.as_uri())
        end = time.monotonic() + 60
        while tab.get("document.querySelectorAll('.plot .main-svg').length") < 6 and time.monotonic() < end:
            time.sleep(0.2)
        assert tab.get("document.documentElement.scrollWidth") <= width
        plots = tab.get(BOXES)
    assert len(plots) == 6
    assert {name: overlaps(plot["found"]) for name, plot in plots.items() if overlaps(plot["found"])} == {}


def test_each_picture_is_followed_by_what_it_says_and_what_made_it(words):
    page = render(words)
    assert page.count('<p class="verdict">') >= 5
    assert page.count('made by <a href="#provenance"><code>steer demo</code></a>') == 6
    assert "On all problems, accuracy: edited" in page
