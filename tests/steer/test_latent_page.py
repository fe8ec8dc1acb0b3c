"""The strongest contexts of latents, the page that shows them, and the commands about autoencoders."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from probes import Site, generate, load, write_completions
from probes.model import tokenizer_of
from probes.saes import SparseAutoencoder, load_sae, reason_score, save_sae, top_contexts, verdicts
from probes.saes.reading import streamed
from probes.thinking import thinking
from steer.cli.main import app
from steer.report import save_latents
from steer.tasks import task_named

WORDS = {"result": ["=7", "=9", "=3"], "opening": ["Okay"]}


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def completions(organism):
    return generate(organism, [problem.question for problem in task_named("chains").sample(20, "probe")])


@pytest.fixture(scope="module")
def spans(completions):
    return [thinking(c) for c in completions if c.span is not None]


@pytest.fixture(scope="module")
def sae():
    return load_sae("organism-L1")


def test_contexts_are_the_strongest_of_all_texts(organism, sae, spans):
    latents = reason_score(organism, sae, spans, words=WORDS).top(4)
    found = top_contexts(organism, sae, latents, spans, count=3)
    peaks = {latent: [] for latent in latents}
    for read in streamed(organism, spans, sae.site):
        f = sae.encode(read.x) * read.used[:, None]
        for latent in latents:
            peaks[latent].append((float(f[:, latent].max()), read.number))
    for latent in latents:
        want = sorted((peak for peak, _ in peaks[latent] if peak > 0), reverse=True)[:3]
        assert [c.peak for c in found[latent]] == pytest.approx(want, rel=1e-5)
        for context in found[latent]:
            assert spans[context.text].ids[context.position] == context.ids[context.position - context.start]
    first = found[latents[0]][0]
    assert f"⟨{tokenizer_of(organism).decode([first.ids[first.position - first.start]])}⟩" in first.marked(
        tokenizer_of(organism)
    )


def test_a_latent_that_never_fires_has_none(organism, spans):
    eye = torch.eye(96)
    dead = SparseAutoencoder(Site(1, "resid_post"), eye, torch.full((96,), -1e6), eye, torch.zeros(96))
    assert top_contexts(organism, dead, [0], spans) == {0: ()}


def test_the_page_is_whole_and_fetches_nothing(organism, sae, spans, completions, tmp_path):
    scores = reason_score(organism, sae, spans, words=WORDS)
    latents = scores.top(3)
    chains = [c.thinking for c in completions if c.span is not None]
    told = verdicts(organism, sae, latents, chains, [c.prompt for c in completions], cues=["Okay"], density=4)
    save_latents(organism, sae, latents, spans, tmp_path / "page.html", scores=scores, verdicts=told)
    text = (tmp_path / "page.html").read_text()
    assert text.count("<section") == 4
    assert "default-src 'none'" in text
    for latent in latents:
        assert f'id="latent-{latent}"' in text
        assert told.verdict(latent) in text
    assert "--shade:1.000" in text
    assert len(text) < 8_000_000


class TestCommands:
    @pytest.fixture
    def texts(self, completions, tmp_path):
        write_completions(tmp_path / "texts.jsonl", completions)
        return str(tmp_path / "texts.jsonl")

    @staticmethod
    def run(*words):
        done = CliRunner().invoke(app, [*map(str, words), "--json"])
        assert done.exit_code == 0, (done.output, done.exception)
        return json.loads(done.output.splitlines()[-1])

    def test_train_check_and_score(self, texts, tmp_path):
        made = self.run(
            "sae", "train", "organism", texts, "-o", tmp_path / "sae", "--site", "L1.resid_post", "--d-sae", 128,
            "--tokens", 2_000, "--k", 8, "--batch-size", 64,
        )  # fmt: skip
        assert 0 < made["explained"] <= 1
        told = self.run("sae", "check", "organism", tmp_path / "sae", texts)
        assert told["explained"] == pytest.approx(made["explained"], abs=1e-3)
        told = self.run("sae", "score", "organism", tmp_path / "sae", texts, "--top", 3, "-o", tmp_path / "page.html")
        assert len(told["top"]) == 3
        assert (tmp_path / "page.html").is_file()

    def test_a_wrong_label_is_refused(self, sae, texts, tmp_path):
        save_sae(replace(sae, site=Site(3, "mlp_out")), tmp_path / "wrong", model="organism")
        with pytest.raises(ValueError, match="L3.mlp_out"):
            CliRunner().invoke(
                app, ["sae", "check", "organism", str(tmp_path / "wrong"), texts], catch_exceptions=False
            )
        told = self.run("sae", "check", "organism", tmp_path / "wrong", texts, "--site", "L1.resid_post")
        assert told["explained"] > 0.9

    def test_an_unknown_architecture(self, texts, tmp_path):
        with pytest.raises(ValueError, match="'gated'.*topk"):
            CliRunner().invoke(
                app, ["sae", "train", "organism", texts, "-o", str(tmp_path / "x"), "--site", "L1.resid_post",
                      "--architecture", "gated"], catch_exceptions=False,
            )  # fmt: skip
