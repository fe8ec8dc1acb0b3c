"""Attention sinks are no part of a mean: what comes before a text does not change what is read of it."""

import warnings

import pytest
import torch

from probes import Direction, Site, Span, difference_in_means, direction_between, load, record
from probes.activations.reduction import kept
from probes.directions import contrast_vectors, principal_components
from probes.model import tokenizer_of
from probes.thinking import text_span

PLAIN = [
    "The train from London leaves at nine in the morning, and it arrives at noon.",
    "She bought two apples and three pears at the market, and paid five dollars.",
    "The museum is closed on Monday, but it is open on all other days of the week.",
    "My brother works in a bank, and my sister teaches music at a small school.",
    "Water boils at one hundred degrees, and it freezes at zero degrees.",
    "The river flows from the mountains to the sea, past three large towns.",
    "They planted a tree in the garden, and it grew taller than the house.",
    "The book has ten chapters, and the last of them is the longest one.",
    "He repaired the old clock with a screwdriver and a small drop of oil.",
    "The dog ran across the field and brought the ball back to the boy.",
]
WORDY = [
    "Well, if I remember it correctly, I would say that the train from London probably leaves at about nine in the "
    "morning, and so it should, I think, arrive at around noon or so.",
    "So, as far as I was able to see from over there, she bought something like two apples and maybe three pears at "
    "the market, and I think that she paid about five dollars.",
    "Hmm, let me think about this, I believe that the museum is usually closed on Monday, but it seems to me that it "
    "is, in general, open on all of the other days of the week.",
    "Let me see, I am fairly sure that my brother still works in a bank somewhere, and perhaps, if I am not mistaken, "
    "my sister teaches some music at a rather small school.",
    "Okay, so I think that we can say that water boils at about one hundred degrees, and it probably freezes, if I "
    "recall it right, at something like zero degrees.",
    "Now, I would guess that the river flows, more or less, from the mountains down to the sea, and it goes, I "
    "suppose, past about three rather large towns on its way.",
    "I seem to remember that they once planted some kind of a tree in the garden, and then, after a while, I think it "
    "grew to be even taller than the house itself.",
    "Wait, I think that the book has, if I counted right, about ten chapters, and it seems to me that the very last of "
    "them is probably also the longest one.",
    "Maybe I am wrong, but I think he somehow repaired the old clock, and he did it with just a screwdriver and, I "
    "suppose, with what was a rather small drop of oil.",
    "Well, what I saw was that the dog ran, I would say quite fast, across the field, and then, after some time, it "
    "brought the ball back, I believe, to the boy.",
]
NEUTRAL = (
    "This is a sentence that stands here before each of the texts, and it says nothing at all of what comes after it, "
    "as it is always the same one. "
)


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2")


def _between(model, site, before, **words):
    tokenizer = tokenizer_of(model)
    lead = tokenizer.encode(NEUTRAL)[:30] if before else []

    def spans(texts):
        rows = [(*lead, *tokenizer.encode(text)) for text in texts]
        return [Span(tuple(ids), len(lead), len(ids)) for ids in rows]

    return difference_in_means(model, spans(WORDY), spans(PLAIN), [site], **words)[site]


@pytest.mark.parametrize("layer", [8, 11])
def test_thirty_neutral_tokens_before_each_text_change_little(smollm2, layer):
    site = Site(layer, "resid_post")
    alone, after = (_between(smollm2, site, before) for before in (False, True))
    assert float(alone.unit @ after.unit) >= 0.9
    if layer == 11:
        with pytest.warns(UserWarning, match="One position holds 8.% of a text's norm at L1"):
            alone = _between(smollm2, site, False, keep_sinks=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            after = _between(smollm2, site, True, keep_sinks=True)
        assert abs(float(alone.unit @ after.unit)) < 0.5  # with the sinks it is another direction


def test_the_share_and_the_count_are_part_of_the_birth(smollm2, tmp_path):
    direction = direction_between(smollm2, WORDY, PLAIN, "L14.resid_post")
    birth = direction.provenance
    assert birth.left_out == len(WORDY) + len(PLAIN)
    assert birth.sink_share > 0.8
    direction.save(tmp_path / "d.safetensors")
    assert Direction.load(tmp_path / "d.safetensors").provenance == birth
    assert direction_between(smollm2, WORDY, PLAIN, "L14.resid_post", position="text_last").provenance.left_out == 0


def test_what_is_left_out():
    site, real = Site(1, "resid_post"), torch.ones(1, 6, dtype=torch.bool)
    x = torch.ones(1, 6, 8)
    x[0, 2, 3] = 100.0  # one coordinate holds its norm
    x[0, 4] *= 50.0  # as far beyond, but in all coordinates
    wanted = real.clone()
    norms = x.norm(dim=-1)
    assert kept(x, norms, wanted, real, site).tolist() == [[False, True, False, True, True, True]]
    assert kept(x, norms, wanted, real, Site(1, "attn_out")).tolist() == [[False, True, True, True, True, True]]
    alone = torch.tensor([[True, False, True, False, False, False]])  # nothing but sinks: read as asked
    assert torch.equal(kept(x, norms, alone, real, site), alone)


def test_a_mean_is_over_what_is_kept(organism):
    site, span = Site(2, "resid_post"), text_span(organism, "a 3 b +4")
    later = Span(span.ids, 1, 4)
    ours, theirs = (record(organism, [one], [site])[site].activation.mean for one in (span, later))
    assert torch.equal(ours, theirs)
    whole = record(organism, [span], [site], keep_sinks=True)[site]
    first, rest = (record(organism, [Span(span.ids, a, b)], [site])[site] for a, b in ((0, 1), (1, 4)))
    torch.testing.assert_close(
        whole.activation.mean, (first.activation.mean + 3 * rest.activation.mean) / 4, atol=1e-5, rtol=0
    )
    components, _ = principal_components(organism, [span], site, k=1)
    again, _ = principal_components(organism, [later], site, k=1)
    torch.testing.assert_close(components.abs(), again.abs())


def test_a_component_of_what_does_not_spread_is_refused(organism):
    site = Site(2, "resid_post")
    one, other = [text_span(organism, "a 3 quick")], [text_span(organism, "a 3")]
    for n in (1, 3):
        with pytest.raises(ValueError, match="no spread"):
            contrast_vectors(organism, one * n, other * n, [site], estimator="pca")
    assert contrast_vectors(organism, one, other, [site], estimator="pca uncentred")[site].norm > 0
