"""Scores of latents are those of the formula however the work is cut; what is declared is bounded; controls tell words
from phases."""

import math
from dataclasses import replace

import pytest
import torch

from probes import Sampling, generate
from probes.model.loading import delimiters_of, load, tokenizer_of
from probes.model.sites import Site
from probes.saes import (
    Differences,
    SparseAutoencoder,
    latent_contrast,
    phase_contrast,
    prompt_only,
    reason_score,
    segment_contrast,
    verdicts,
)  # fmt: skip
from probes.saes._reason_score import WORDS, score_of, windows
from probes.saes._verdicts import deleted
from probes.saes.reading import class_moments, streamed
from probes.thinking import Segment, thinking
from probes.thinking.spans import Span

SITE = Site(2, "resid_post")
MARKS = {"okay": ["Okay"], "equals": ["=3", "=7", "=9"], "wait": ["Wait"]}


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def written(organism):
    prompts = [f"a {i % 10} b +{(3 * i) % 10} c *{i % 7}" for i in range(24)]
    return generate(organism, prompts, sampling=Sampling(temperature=0.7, seed=1))


@pytest.fixture(scope="module")
def spans(written):
    return [thinking(completion) for completion in written if completion.span is not None]


def sae_at_random(d_sae=60, k=8):
    return SparseAutoencoder.at_random(SITE, d_in=96, d_sae=d_sae, k=k, seed=3)


def by_hand(model, sae, spans, alpha):
    """All activations stored, every mean taken at once, in float64."""
    tokenizer, f, marks = tokenizer_of(model), [], {word: [] for word in MARKS}
    for read in streamed(model, spans, SITE):
        f.append((sae.encode(read.x) * sae.W_dec.norm(dim=1))[read.used].double())
        for word, forms in MARKS.items():
            hit = torch.zeros(len(read.x), dtype=torch.bool)
            ids = list(spans[read.number].ids)
            for form in forms:
                spelled = tokenizer.encode(form, add_special_tokens=False)
                for i in range(len(ids) - len(spelled) + 1):
                    if ids[i : i + len(spelled)] == spelled:
                        hit[max(0, i - 2) : i + len(spelled) + 3] = True
            marks[word].append(hit[read.used])
    f, marks = torch.cat(f), {word: torch.cat(hits) for word, hits in marks.items()}
    present = {word: hit for word, hit in marks.items() if word in MARKS}
    mean = torch.stack([f[hit].mean(0) if hit.any() else torch.zeros(f.shape[1]).double() for hit in present.values()])
    union = torch.stack(list(present.values())).any(0)
    share = mean / mean.sum(0).clamp(min=1e-12)
    entropy = -(share * share.clamp(min=1e-300).log()).sum(0) / math.log(len(present))
    inside, outside = f[union].mean(0), f[~union].mean(0)
    return inside / inside.sum() * entropy**alpha - outside / outside.sum(), entropy


@pytest.mark.parametrize("alpha", [0.7, 0.0])
def test_reason_score_is_that_of_the_formula(organism, spans, alpha):
    sae = sae_at_random()
    found = reason_score(organism, sae, spans, words=MARKS, alpha=alpha)
    want, entropy = by_hand(organism, sae, spans, alpha)
    torch.testing.assert_close(found.score, want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-5, atol=1e-6)
    assert found.n_marked < found.n_tokens
    assert found.table().rows[0][0] == found.top(1)[0]


@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_however_it_is_cut_it_is_the_same(organism, spans, tokens):
    sae = sae_at_random()
    whole = reason_score(organism, sae, spans, words=MARKS)
    cut = reason_score(organism, sae, spans, words=MARKS, chunk_bytes=4 * 60 * tokens)
    torch.testing.assert_close(cut.score, whole.score, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(cut.inside.mean, whole.inside.mean, rtol=1e-5, atol=1e-7)


def test_the_words_are_the_paper_s():
    assert sum(map(len, WORDS.values())) == 34
    assert len(WORDS) == 10
    assert WORDS["let me"] == ("let me", " let me", "Let me", " Let me")


def test_windows_reach_before_and_after():
    mask = windows([5, 6, 7, 8, 9, 5, 5], [(8, 9)], (2, 1))
    assert mask.int().tolist() == [0, 1, 1, 1, 1, 1, 0]
    assert not windows([5], [(8, 9)], (2, 1)).any()


def test_no_word_is_an_error(organism, spans):
    with pytest.raises(ValueError, match="None of the words occurs in the .* spans: quick"):
        reason_score(organism, sae_at_random(), spans, words={"quick": ["quick"]})
    with pytest.raises(ValueError, match="can spell none of the words"):
        reason_score(organism, sae_at_random(), spans, words={"xyzzy": ["xyzzy"]})


def test_a_score_of_means():
    """One latent that all words share evenly, one of one word alone, one of the rest."""
    by_word = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    score, entropy = score_of(by_word, torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 3.0]))
    torch.testing.assert_close(entropy, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(score, torch.tensor([0.5, 0.0, -1.0]))


def test_declared_ones_are_false_at_the_stated_rate_where_labels_are_shuffled():
    """200 draws of texts whose two classes are alike: how often anything is declared is the rate, at most."""
    numbers = torch.Generator().manual_seed(0)
    n, d_sae, any_declared = 40, 200, 0
    rate = torch.rand(d_sae, generator=numbers) * 0.3  # as latents are: rarely active, and skewed
    for _ in range(200):
        told = Differences.none(d_sae)
        f = torch.rand(n, 2, d_sae, generator=numbers).log().neg() * (torch.rand(n, 2, d_sae, generator=numbers) < rate)
        flip = torch.rand(n, generator=numbers) < 0.5
        for text, turned in zip(f, flip, strict=True):
            told.add((text[0] - text[1]) * (-1 if turned else 1))
        any_declared += bool(told.declared().any())
    assert any_declared <= 16  # 10 of 200 are expected, and 16 is two deviations more


def test_what_is_planted_is_declared():
    numbers = torch.Generator().manual_seed(1)
    told = Differences.none(100)
    for _ in range(60):
        f = torch.rand(100, generator=numbers) - 0.5
        f[:5] += 0.5
        told.add(f)
    assert told.declared()[:5].all()
    low, high = told.interval()
    assert ((low <= told.mean) & (told.mean <= high)).all()


class TestContrasts:
    def test_phases_are_told_apart_as_by_hand(self, organism, written):
        sae = sae_at_random()
        found = phase_contrast(organism, sae, written, "thinking", "prompt")
        differences = []
        for completion in written:
            if completion.span is None:
                continue
            ids, span = tuple(completion.all_ids), completion.span
            (read,) = streamed(organism, [Span(ids, 0, len(ids))], SITE)
            f = sae.encode(read.x)
            thinks = torch.zeros(len(ids), dtype=torch.bool)
            thinks[span.first : span.end - 1] = True
            prompt = torch.arange(len(ids)) < span.first
            differences.append(f[thinks & read.used].mean(0) - f[prompt & read.used].mean(0))
        torch.testing.assert_close(
            found.difference.mean.float(), torch.stack(differences).mean(0), rtol=1e-4, atol=1e-5
        )
        assert found.table().rows[0][0] in found.declared()

    def test_an_unknown_phase(self, organism, written):
        with pytest.raises(ValueError, match="'thought' is no phase"):
            phase_contrast(organism, sae_at_random(), written, "thought")

    def test_segments(self, organism, written):
        labelled = [
            (
                c,
                [
                    Segment(c.span.start, c.span.start + 2, "execution"),
                    Segment(c.span.start + 2, c.span.end, "reflection"),
                ],
            )
            for c in written
            if c.span is not None and c.span.end - c.span.start > 3
        ]
        found = segment_contrast(organism, sae_at_random(), labelled, "execution", "reflection")
        assert found.classes == ("execution", "reflection")
        assert found.difference.n == len(labelled)

    def test_texts_that_lack_a_class_do_not_count(self, organism, spans):
        masks = [torch.ones(len(span.ids), dtype=torch.bool) for span in spans]
        with pytest.raises(ValueError, match="Only 0 of .* texts hold both"):
            latent_contrast(organism, sae_at_random(), spans, masks, [~mask for mask in masks])

    def test_memory_is_a_chunk(self, organism, spans):
        """What is encoded at once is no more rows than the chunk has room for."""
        sae, rows = sae_at_random(), []

        class Watched(SparseAutoencoder):
            def encode(self, x):
                rows.append(len(x))
                return super().encode(x)

        watched = Watched(**{name: getattr(sae, name) for name in sae.__dataclass_fields__})
        classes = [torch.ones(1, len(span.ids), dtype=torch.bool) for span in spans]
        for _ in class_moments(organism, watched, spans, classes, chunk_bytes=4 * 60 * 5):
            pass
        assert max(rows) <= 5


class TestPlanted:
    """At the embeddings of the organism an encoder can be solved for that fires at the tokens one wishes."""

    CUES = ("Okay",)

    @pytest.fixture
    def planted(self, organism):
        tokenizer, E = tokenizer_of(organism), organism.get_input_embeddings().weight.detach().float()
        cues = [tokenizer.encode(w, add_special_tokens=False)[0] for w in self.CUES]
        results = [tokenizer.encode(f"={i}", add_special_tokens=False)[0] for i in range(10)]
        wanted = torch.zeros(4, len(E))
        wanted[0, cues] = 1  # a word
        wanted[1, results] = 1  # a phase
        wanted[2, cues + results] = 1  # both
        wanted[3, tokenizer.encode("c", add_special_tokens=False)[0]] = 1  # of neither
        W_enc = torch.linalg.lstsq(E, wanted.T, driver="gelsd").solution
        return SparseAutoencoder(
            Site(0, "resid_pre"),
            W_enc,
            torch.zeros(4),
            W_enc.T.contiguous(),
            torch.zeros(96),
            "jumprelu",
            torch.full((4,), 0.5),
        )

    def test_the_controls_give_the_verdicts(self, organism, planted):
        chains = [f"a {i} b +{i} Okay a ={i} Okay b ={(2 * i) % 10}" for i in range(10)]
        other = [f"a {i} b +{i} c *{(3 * i) % 10}" for i in range(10)]
        told = verdicts(organism, planted, [0, 1, 2, 3], chains, other, cues=self.CUES, density=3)
        assert [told.verdict(i) for i in range(4)] == ["word", "phase", "both", "neither"]
        assert [row[-1] for row in told.table().rows] == ["word", "phase", "both", "neither"]
        assert float(told.without_cues[0]) == 0
        assert float(told.by_cue[1]) == pytest.approx(0, abs=1e-6)
        with pytest.raises(ValueError, match="Latent 9 was not asked about"):
            told.verdict(9)

    def test_cues_are_deleted_with_their_comma(self):
        assert deleted("Wait, let me see. But then waiting. wait", ["Wait", "But"]) == "let me see. then waiting. "

    def test_prompt_only_latents_are_active_at_both_delimiters_alone(self, organism, planted):
        E, d = organism.get_input_embeddings().weight.detach().float(), delimiters_of(organism)
        wanted = torch.zeros(4, len(E))
        wanted[0, [*d.open, *d.close]] = 1
        wanted[1, list(d.open)] = 1
        wanted[2, [*d.open, *d.close, 6]] = 1
        W_enc = torch.linalg.lstsq(E, wanted.T, driver="gelsd").solution
        sae = replace(planted, W_enc=W_enc)
        assert prompt_only(organism, sae, [1, 6, 17, 5, *d.open, 56, *d.close, 21]) == [0]
        with pytest.raises(ValueError, match="lacks the closing delimiter"):
            prompt_only(organism, sae, [1, 6, 17, 5, *d.open, 56])
