"""The page of a chain: its numbers are the readers', its text is inert, and in a browser its keys and clicks work."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from devtools import browsing
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from probes import Site, direction_between, generate, load, write_completions
from probes.activations import Attended, confidences, locate, read_trajectories, span_attention, weights_along
from probes.model import ThinkingSpan, tokenizer_of
from probes.saes import load_sae
from probes.saes.reading import streamed
from probes.thinking import Segment, Span, segments
from steer import Add, Attend, Recipe, Scale, SetLatents, applied
from steer.cli.main import app
from steer.interventions import Reinforce
from steer.view import (
    Side,
    Track,
    attention,
    confidence,
    experts,
    latents,
    listening,
    projections,
    read_tracks,
    reading_named,
    touched,
    trajectory,
    view,
)
from steer.view.alignment import aligned, shared
from steer.view.side import token_texts

PROMPT = "a 3 b +4 c *7"
HOSTILE = '</script><script>document.documentElement.dataset.taken = 1</script><img src=x onerror="alert(1)">\'"&\u2028'


@pytest.fixture(scope="module")
def model():
    return load("organism")


@pytest.fixture(scope="module")
def plain(model):
    return generate(model, [PROMPT])[0]


@pytest.fixture(scope="module")
def recipe(model):
    return Recipe.of(model, [Scale(Site(2, "mlp_out"), 0.5)], scope="thinking")


@pytest.fixture(scope="module")
def steered(model):
    with applied(model, Recipe.of(model, [Add(Site(2, "resid_post"), torch.ones(96), 2.0)], scope="thinking")):
        return generate(model, [PROMPT])[0]


@pytest.fixture(scope="module")
def direction(model):
    return direction_between(model, ["a 3 quick"], ["a 3"], "L2.resid_post", position="text_last")


def each_kind():
    """A step of each kind."""
    return [
        Add(Site(1, "resid_post"), torch.ones(96), 0.1), Reinforce.of((2, 1), 4.0), Attend(Site(3, "pattern"), 0.5),
        SetLatents.of(load_sae("organism-L1"), {6: 2.0}),
    ]  # fmt: skip


def values(tracks):
    return {track.name: track.values for track in tracks}


def of_bytes():
    """A tokenizer that has a token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1])


def floats(text):
    return np.frombuffer(base64.b64decode(text), "<f4")


class TestReadings:
    def test_each_track_is_what_its_reader_says(self, model, plain, direction):
        sae, begin = load_sae("organism-L1"), len(plain.prompt_ids)
        readings = [
            confidence(), trajectory(segment=3), projections({"quick": direction}), latents(sae, [6, 171]),
            experts((2, 1), (3, 0)), attention("b +4"),
        ]  # fmt: skip
        found = values(read_tracks(model, plain, readings))
        (sure,), (chain,) = confidences(model, [plain]), read_trajectories(model, [plain], segment=3)
        close = {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True}
        torch.testing.assert_close(found["log-probability"][begin:], sure.log_probabilities, **close)
        torch.testing.assert_close(found["entropy"][begin:], sure.entropies, **close)
        assert found["entropy"][:begin].isnan().all()
        start = max(begin, plain.span.first)
        for n, name in enumerate(("net change", "cumulative change")):
            seen = found[name][start : start + chain.tokens]
            assert seen[:3].isnan().all()
            steps = chain.steps[n].mean(1).float().repeat_interleave(3)[: chain.tokens - 3]
            torch.testing.assert_close(seen[3:], steps, **close)
            assert found[name].isnan().sum() == len(plain.all_ids) - chain.tokens + 3
        whole = Span(plain.all_ids, 0, len(plain.all_ids))
        for site, name, take in (
            (direction.site, "quick", lambda x: x @ direction.unit),
            (sae.site, "latent 171", lambda x: sae.encode(x)[:, 171]),
        ):
            (read,) = streamed(model, [whole], site, keep_sinks=True)
            torch.testing.assert_close(found[name][1:], take(read.x)[1:], **close)
            assert found[name][0].isnan()
        weights = weights_along(model, plain)
        torch.testing.assert_close(found["L2E1"], weights[2, :, 1], **close)
        load_of = (weights > 0).float().mean(1) * 8 / 2
        mean = ((weights > 0) * load_of[:, None]).sum((0, 2)) / (4 * 2)
        torch.testing.assert_close(found["load"], mean, **close)
        keys = locate(model, plain.prompt_ids, "b +4")
        (paid,) = span_attention(model, [Attended(plain.all_ids, keys, begin, begin, len(plain.all_ids))])
        torch.testing.assert_close(found["b +4"][begin:], paid.share.mean((0, 1)), **close)

    def test_parts_with_a_cache_say_what_one_pass_says(self, model, plain, direction, monkeypatch):
        readings = [confidence(), trajectory(segment=3), projections({"quick": direction}), experts((2, 1))]
        every = Recipe.of(model, each_kind(), scope="thinking")
        whole = values(read_tracks(model, plain, readings, recipe=every))
        monkeypatch.setattr(listening, "CHUNK", 4)
        parts = values(read_tracks(model, plain, readings, recipe=every))
        assert list(whole) == list(parts)
        for name in whole:
            torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-3, equal_nan=True)

    def test_a_recipe_tells_where_and_how_hard(self, model, plain, recipe):
        touched, *rest = read_tracks(model, plain, [confidence()], recipe=recipe)
        at = (~touched.values.isnan()).nonzero()[:, 0].tolist()
        assert at == list(range(plain.span.first, plain.span.end - 1))
        assert touched.values[at].tolist() == pytest.approx([0.5] * len(at), abs=1e-4)
        assert (touched.group, touched.unit) == ("recipe", "‖Δ‖/‖x‖")
        with applied(model, recipe):
            (sure,) = confidences(model, [plain])
        torch.testing.assert_close(
            rest[0].values[len(plain.prompt_ids) :], sure.log_probabilities, rtol=1e-4, atol=1e-4
        )
        assert len(read_tracks(model, plain, [])) == 0

    def test_every_kind_of_step_is_told(self, model, plain):
        steps = each_kind()
        tracks = read_tracks(model, plain, [], recipe=Recipe.of(model, steps))
        assert [track.name.partition(" at ")[0] for track in tracks] == [step.kind for step in steps]
        with applied(model, Recipe.of(model, steps)) as log:
            log.keep()
            ids = torch.tensor([plain.all_ids])
            model(ids)
        for step, track in enumerate(tracks):
            known = track.values[~track.values.isnan()]
            assert float(known.mean()) == pytest.approx(log.mean_ratio(step), rel=1e-3)

    def test_what_was_touched_while_it_was_written_is_what_reading_it_again_touches(self, model):
        recipe = Recipe.of(model, [Add(Site(2, "resid_post"), torch.ones(96), 0.2)], scope="thinking")
        with applied(model, recipe) as log:
            log.keep()
            (completion,) = generate(model, [PROMPT])
        (written,), (again,) = touched(log, completion), read_tracks(model, completion, [], recipe=recipe)
        torch.testing.assert_close(written.values[:-1], again.values[:-1], rtol=1e-3, atol=1e-4, equal_nan=True)
        with applied(model, recipe) as log:
            with pytest.raises(ValueError, match="unless `keep\\(\\)` was called before the run"):
                touched(log, completion)
            log.keep()
            generate(model, [PROMPT, PROMPT])
            with pytest.raises(ValueError, match="several were run at once"):
                touched(log, completion)

    def test_many_steps_are_one_track(self, model, plain):
        many = Recipe.of(
            model, [Scale(Site(layer, name), 0.9) for layer in range(3) for name in ("mlp_out", "attn_out")]
        )
        (track,) = read_tracks(model, plain, [], recipe=many)
        assert track.name == "the strongest of 6 steps"

    def test_readings_are_refused_in_a_sentence(self, model, plain):
        with pytest.raises(ValueError, match="'b \\+5' does not occur"):
            read_tracks(model, plain, [attention("b +5")])
        with pytest.raises(ValueError, match="L9E0 is no expert of this model"):
            read_tracks(model, plain, [experts((9, 0))])
        for name in ("confidence:3", "latents:organism-L1", "experts:L2", "trajectory:0", "magic"):
            with pytest.raises(ValueError, match="is not a reading. Known: confidence"):
                reading_named(name)


class TestPage:
    def test_arrays_come_back_as_they_were(self, model, plain):
        track = Track("mine", torch.randn(len(plain.all_ids)).index_fill(0, torch.tensor([2]), torch.nan))
        (side,) = data_of(view(plain, model=model, tracks=[track]).html)["sides"]
        assert np.array_equal(floats(side["tracks"][0]["values"]), track.values.numpy(), equal_nan=True)
        index = np.frombuffer(base64.b64decode(side["index"]), "<u4")
        assert [side["ids"][i] for i in index] == list(plain.all_ids)
        assert "".join(side["texts"][i] for i in index).strip() == tokenizer_of(model).decode(plain.all_ids)
        assert [Segment(*row) for row in side["segments"][:-1]] == list(segments(model, plain, "organism"))
        assert side["segments"][-1] == [plain.span.end, len(plain.all_ids), "answer"]

    def test_hostile_text_is_data_and_nothing_else(self, model, plain):
        class Tags(HTMLParser):
            def __init__(self, text):
                super().__init__()
                self.tags = []
                self.feed(text)

            def handle_starttag(self, tag, attributes):
                self.tags.append((tag, tuple(sorted(dict(attributes)))))

        bad = replace(plain, id=HOSTILE, prompt=HOSTILE, thinking=HOSTILE, answer=HOSTILE, model=HOSTILE)
        side = Side(
            HOSTILE,
            HOSTILE,
            (HOSTILE,) * 3,
            (1, 2, 3),
            1,
            (1, 3),
            (),
            {HOSTILE: (1,)},
            (Track("x", torch.ones(3), HOSTILE),),
        )
        honest = Tags(view(plain, model=model).html).tags
        for shown in (view(bad), replace(view(plain, model=model), title=HOSTILE, sides=(side, side))):
            assert Tags(shown.html).tags == honest
            assert len(Tags(shown._repr_html_()).tags) == 1

    def test_it_is_one_file_that_fetches_nothing(self, model, plain):
        html = view(plain, model=model).html
        assert re.search(
            r"http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'sha256-", html
        )
        assert not re.search(
            r"https?:|//[a-z]+\.|url\(|@import|innerHTML|insertAdjacentHTML|document\.write|\seval\(", html
        )
        assert not re.search(r"<(link|img|iframe|object|embed|base)\b|\ssrc=|\sstyle=", html)

    def test_a_long_chain_with_eight_tracks_is_small(self, model, plain):
        n = 16_000
        ids = plain.prompt_ids + tuple(torch.randint(6, 90, (n,), generator=torch.Generator().manual_seed(0)).tolist())
        long = replace(plain, ids=ids[len(plain.prompt_ids) :], span=ThinkingSpan(8, 8, n, closed=True, n_close=1))
        tracks = [Track(str(i), torch.randn(len(ids))) for i in range(8)]
        assert len(view(long, model=model, tracks=tracks).html.encode()) < 2_000_000

    def test_it_is_written_whole_or_not_at_all(self, model, plain, tmp_path):
        shown = view(plain, model=model)
        path = shown.save(tmp_path / "chain.html")
        assert path.read_text(encoding="utf-8") == shown.html
        assert [found.name for found in tmp_path.iterdir()] == ["chain.html"]

    def test_without_a_model_there_are_words_and_with_a_tokenizer_tokens(self, model, plain):
        (words,) = view(plain).sides
        assert words.ids is None
        assert "".join(words.texts).split() == f"{plain.prompt} {plain.thinking} {plain.answer}".split()
        (tokens,) = view(plain, model=tokenizer_of(model)).sides
        assert tokens.texts == view(plain, model=model).sides[0].texts
        assert tokens.tracks == ()

    def test_a_letter_of_several_tokens_stands_at_the_first(self):
        tokenizer = of_bytes()
        ids = tokenizer.encode("so 🦜 then", add_special_tokens=False)
        texts = token_texts(tokenizer, ids)
        assert "".join(texts) == "so 🦜 then"
        assert len(texts) == len(ids)

    def test_markers_begin_where_they_are_written(self, model, plain):
        ids = tokenizer_of(model).encode("Wait a =3 Hmm b =4 Wait", add_special_tokens=False)
        made = replace(plain, ids=tuple(ids), span=ThinkingSpan(8, 7, 8 + len(ids), closed=False))
        assert view(made, model=model).sides[0].markers == {"Wait": (8, 14), "Hmm": (11,)}

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            ({"tracks": [Track("a", torch.zeros(3))]}, "The track 'a' has 3 numbers, for 21 tokens."),
            ({"tracks": [Track("a", torch.zeros(21))] * 2}, "Two tracks of 'own' are called 'a'."),
            ({"rules": "nothing"}, "'nothing' names no rules"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, model, plain, words, sentence):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            view(plain, model=model, **words)

    def test_what_needs_a_model_is_refused_without_one(self, plain, recipe):
        for words in ({"tracks": [confidence()]}, {"recipe": recipe}):
            with pytest.raises(ValueError, match="need the model that wrote the completion"):
                view(plain, **words)
        with pytest.raises(ValueError, match="two sides already"):
            view(plain, beside=view(plain, beside=plain))
        with pytest.raises(ValueError, match="one line of words"):
            Track("", torch.zeros(1))
        with pytest.raises((ValueError, TypeError), match="shape|values"):
            Track("two rows", torch.zeros(2, 3))


class TestAlignment:
    def side(self, ids, starts, prompt=2):
        bounds = [*starts, len(ids)]
        thoughts = tuple(Segment(a, b, "execution") for a, b in zip(bounds, bounds[1:], strict=False))
        return Side("x", "", tuple(map(str, ids)), tuple(ids), prompt, (prompt, len(ids)), thoughts)

    def test_the_shared_beginning_and_then_thought_by_thought(self):
        one, other = (
            self.side([1, 2, 3, 4, 5, 6, 7, 8], [2, 4, 6]),
            self.side([1, 2, 3, 9, 9, 9, 9, 9, 9, 9], [2, 5, 8]),
        )
        assert shared(one, other) == 3
        assert aligned(one, other) == [(0, 0), (3, 3), (4, 5), (6, 8), (8, 10)]

    def test_points_rise_on_both_sides_whatever_the_chains(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            sides = []
            for _ in range(2):
                n = int(torch.randint(3, 40, (), generator=generator))
                starts = sorted({2, *torch.randint(2, n, (5,), generator=generator).tolist()})
                sides.append(self.side(torch.randint(0, 3, (n,), generator=generator).tolist(), starts))
            points = aligned(*sides)
            assert points[0] == (0, 0)
            assert points[-1] == tuple(len(side.texts) for side in sides)
            assert all(a < c and b < d for (a, b), (c, d) in zip(points, points[1:], strict=False))


class TestCommand:
    @staticmethod
    def run(*words):
        return CliRunner().invoke(app, ["view", *map(str, words), "--json"])

    def test_it_writes_what_the_library_does(self, model, plain, steered, recipe, direction, tmp_path):
        for name, completion in (("plain", plain), ("steered", steered)):
            write_completions(tmp_path / f"{name}.jsonl", [completion])
        recipe.save(tmp_path / "recipe")
        direction.save(tmp_path / "quick.safetensors")
        done = self.run(
            tmp_path / "plain.jsonl", "--id", plain.id, "--model", "organism", "--track", "confidence", "--track",
            f"direction:{tmp_path / 'quick.safetensors'}", "--beside", tmp_path / "steered.jsonl", "--recipe",
            tmp_path / "recipe", "-o", tmp_path / "chain.html",
        )  # fmt: skip
        assert done.exit_code == 0, (done.output, done.exception)
        readings = [confidence(), projections({"quick": direction})]
        other = view(steered, model=model, tracks=readings, recipe=recipe)
        want = view(plain, model=model, tracks=readings, beside=other)
        assert data_of((tmp_path / "chain.html").read_text()) == data_of(want.html)
        assert json.loads(done.output.splitlines()[-1])["tokens"] == len(plain.all_ids)

    def test_what_is_not_there_is_refused(self, plain, tmp_path):
        write_completions(tmp_path / "plain.jsonl", [plain])
        assert self.run(tmp_path / "plain.jsonl", "-o", tmp_path / "words.html").exit_code == 0
        with pytest.raises(ValueError, match="holds no sample 0 of 'none'. Its first problems: 0."):
            CliRunner().invoke(app, ["view", str(tmp_path / "plain.jsonl"), "--id", "none"], catch_exceptions=False)
        assert "--model" in self.run(tmp_path / "plain.jsonl", "--track", "confidence").output


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def opened(tab, model, plain, steered, tmp_path):
    """Both sides in the browser, with the tracks of either."""
    shown = view(plain, model=model, tracks=[confidence(), trajectory(segment=3)], beside=steered)
    tab.events.clear()
    tab.open(shown.save(tmp_path / "chain.html"))
    yield tab, shown
    assert tab.errors == []
    assert all(url.startswith("file:") for url in tab.requests)


def token(side, i):
    return f'.side:nth-child({side + 1}) i[data-i="{i}"]'


def tip(tab):
    return dict(
        tab.get('[...document.querySelectorAll("#tip tr")].map((row) => [...row.children].map((c) => c.textContent))')
    )


def current(tab):
    return tab.get("state.token && [sides.indexOf(state.token.side), state.token.i]")


class TestBrowser:
    def test_pointing_at_a_token_tells_all_of_it(self, opened, plain):
        tab, shown = opened
        side, i = shown.sides[0], 13
        tab.hover(token(0, i))
        told = tip(tab)
        assert json.loads(told["token"]) == side.texts[i]
        assert (told["id"], told["position"], told["phase"]) == (str(plain.all_ids[i]), str(i), "thinking")
        assert told["segment"].startswith("execution, 12 to 14")
        for track in side.tracks:
            value, _, unit = told[track.name].partition(" ")
            assert unit == track.unit
            assert float(value) == pytest.approx(float(track.values[i]), rel=1e-3)
        tab.hover("h1")
        assert tab.get('document.getElementById("tip").hidden')

    def test_a_search_counts_and_goes_on(self, opened):
        tab, shown = opened
        wanted = " b"
        places = [(n, i) for n, side in enumerate(shown.sides) for i, text in enumerate(side.texts) if text == wanted]
        tab.press("/")
        tab.press(*wanted)
        assert tab.get('document.getElementById("find").value') == wanted
        assert tab.get('document.getElementById("found").textContent') == f"1 of {len(places)}"
        assert tuple(current(tab)) == places[0]
        tab.press("Escape", "n")
        assert tuple(current(tab)) == places[1]
        assert tab.get('document.getElementById("found").textContent') == f"2 of {len(places)}"
        tab.press("N", "N")
        assert tuple(current(tab)) == places[-1]
        tab.click("#next")
        assert tuple(current(tab)) == places[0]
        assert tab.get('document.querySelectorAll("i.match").length') == len(places)
        assert tab.get('document.querySelectorAll("i.match.chosen").length') == 1

    def test_what_two_tokens_write_is_found(self, opened):
        tab, _ = opened
        tab.press("/", *"b +4")
        assert tab.get("state.hits[0].hit") == [3, 4]
        tab.press(*"xyz")
        assert tab.get('document.getElementById("found").textContent') == "none"

    def test_markers_thoughts_and_arrows_are_walked(self, opened):
        tab, shown = opened
        side = shown.sides[0]
        tab.press("s")
        assert current(tab) == [0, side.segments[0].start]
        tab.press("s", "ArrowRight", "ArrowRight", "ArrowLeft")
        assert current(tab) == [0, side.segments[1].start + 1]
        tab.press("S")
        assert current(tab) == [0, side.segments[1].start]
        tab.click(token(1, 10))
        assert current(tab) == [1, 10]
        assert tab.get('document.querySelectorAll("i.current").length') == 1
        assert tab.get('document.querySelectorAll("i.twin").length') == 1

    def test_tracks_are_switched_and_colour_the_text(self, opened):
        tab, _ = opened
        height = 'document.querySelector(".chart canvas").clientHeight'
        before = tab.get(height)
        tab.click(".chip")
        assert tab.get('document.querySelector(".chip").getAttribute("aria-pressed")') == "false"
        assert tab.get(height) < before
        tab.press("1")
        assert tab.get(height) == before
        tab.get(
            '{ const s = document.getElementById("shade"); s.selectedIndex = 2; s.dispatchEvent(new Event("change")); }'
        )
        assert tab.get('document.querySelectorAll("i.up").length') > 0

    def test_light_and_dark(self, opened):
        tab, _ = opened
        paper = "getComputedStyle(document.body).backgroundColor"
        light = tab.get(paper)
        tab.click("#theme")
        dark = tab.get(paper)
        assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 24, 28)")
        tab.press("t")
        assert tab.get(paper) == light

    def test_help_and_the_chart(self, opened):
        tab, shown = opened
        tab.press("?")
        assert tab.get('document.getElementById("help").open')
        tab.press("Escape")
        tab.click("#help button") if tab.get('document.getElementById("help").open') else None
        tab.click(".chart")
        assert current(tab) == [0, len(shown.sides[0].texts) // 2]
        tab.press("+")
        assert tab.get("sides[0].chart.to - sides[0].chart.from") <= len(shown.sides[0].texts)

    def test_no_peak_is_lost_between_pixels(self, opened):
        tab, _ = opened
        tab.get("globalThis.spike = new Float32Array(16000).fill(NaN, 0, 100); spike[12345] = 7; spike[777] = -3; 0")
        low, high = tab.get(
            "decimated(spike, 0, 16000, 900).map((x) => Array.from(x, (v) => Number.isNaN(v) ? null : v))"
        )
        assert (min(v for v in low if v is not None), max(v for v in high if v is not None)) == (-3, 7)
        assert high[0] is None

    def test_a_long_chain_keeps_few_elements_and_scrolls_to_its_end(self, tab, model, plain, tmp_path):
        n = 16_000
        ids = tuple(torch.randint(6, 90, (n,), generator=torch.Generator().manual_seed(0)).tolist())
        long = replace(plain, ids=ids, span=ThinkingSpan(8, 8, n, closed=True, n_close=1))
        tab.events.clear()
        tab.open(view(long, model=model, tracks=[Track("x", torch.arange(n + 8.0))]).save(tmp_path / "long.html"))
        many = 'document.querySelectorAll(".text i").length'
        assert tab.get(many) < 3_000
        tab.get(f"go(sides[0], {n + 7}, true)")
        assert tab.get(many) < 3_000
        assert tip(tab)["x"] == str(n + 7)
        assert tab.errors == []

    def test_both_sides_scroll_together_until_they_are_parted(self, tab, model, plain, tmp_path):
        ids = tuple(torch.randint(6, 60, (10_000,), generator=torch.Generator().manual_seed(0)).tolist())
        one, other = (
            replace(plain, ids=(*ids[:1000], *ids[-n:]), span=ThinkingSpan(8, 8, 1000 + n, closed=False))
            for n in (4000, 8000)
        )
        tab.events.clear()
        tab.open(view(one, model=model, beside=other, tracks=[]).save(tmp_path / "both.html"))
        tops = "sides.map((side) => side.text.seen()[0])"
        settled = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))"
        tab.hover(".side:nth-child(1) .text")
        tab.get(f"sides[0].text.box.scrollTop = sides[0].text.row(600) * ROW; {settled}")
        left, right = tab.get(tops)
        assert abs(left - right) < 30  # both begin with the same tokens
        tab.get(f"sides[0].text.box.scrollTop = 1e9; {settled}")
        left, right = tab.get("sides.map((side) => side.chain.owner[side.text.seen()[0]])")
        assert left > 400
        assert abs(left - right) < 20  # thoughts of the same number, as rows begin
        tab.click("#link")
        tab.wheel(".side:nth-child(2) .text", -300)
        tab.get(f"sides[1].text.box.scrollTop = 0; {settled}")
        assert tab.get(tops)[0] > 4000
        assert tab.get(tops)[1] == 0
        assert tab.errors == []

    def test_hostile_text_stays_text(self, tab, plain, tmp_path):
        bad = replace(plain, id=HOSTILE, prompt=HOSTILE, thinking=HOSTILE, answer=HOSTILE, model=HOSTILE)
        tab.events.clear()
        tab.open(view(bad, name=HOSTILE).save(tmp_path / "bad.html"))
        assert tab.get("document.documentElement.dataset.taken ?? null") is None
        assert tab.get('document.querySelectorAll("img").length') == 0
        assert "<img" in tab.get('document.querySelector(".text").textContent')
        assert tab.errors == []
