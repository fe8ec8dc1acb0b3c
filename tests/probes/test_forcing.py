"""Answers that are forced, and confidences, are what a plain pass over the same ids says, in any batch."""

from dataclasses import replace

import pytest
import torch
from families import build, build_tokenizer

from probes import Sampling, generate, load
from probes.activations import confidences, soft_scores
from probes.generation import Forced, forced_answers
from probes.model import decode, tokenizer_of
from probes.model.delimiters import Delimiters

PROMPTS = ["a 3 b +4 c *7", "a 5 b -2 c +9 d *2", "a 3 quick", "b +4"]
WARM = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=40)
MANY = Delimiters((6, 7), (8, 9, 8, 10), (5,), (1,))


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def completions(organism):
    return generate(organism, PROMPTS, samples=2, sampling=WARM)


@pytest.fixture(scope="module")
def several():
    """A model whose delimiters are several tokens, and chains of its own that hold nothing but thoughts."""
    words = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "?")
    model = load(build("qwen3"), tokenizer=build_tokenizer(words), delimiters=MANY)
    sampling = replace(WARM, max_new_tokens=12)
    return model, generate(model, ["w20 w21", "w22"], samples=2, sampling=sampling, prefill=MANY.open)


def stops_of(completions):
    return [[] if c.span is None else list(range(c.span.text_start, c.span.text_end + 1, 2)) for c in completions]


@torch.no_grad()
def plain(model, ids):
    """The logits of one pass, in float64."""
    return model(torch.tensor([ids])).logits[0].double()


@torch.no_grad()
def greedy(model, ids, new):
    """transformers' own greedy search."""
    mask = torch.ones(1, len(ids), dtype=torch.long)
    out = model.generate(
        torch.tensor([ids]), attention_mask=mask, do_sample=False, max_new_tokens=new, temperature=None, top_p=None,
        top_k=None, pad_token_id=0,
    )[0, len(ids) :].tolist()  # fmt: skip
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    return out[: next((i for i, token in enumerate(out) if token in ends), len(out))]


def assert_forced(model, completions, stops, close, suffix=""):
    after = [*close, *tokenizer_of(model).encode(suffix, add_special_tokens=False)] if suffix else list(close)
    found = forced_answers(model, completions, stops, suffix=suffix, max_new_tokens=5)
    assert [[(one.id, one.sample, one.stop) for one in row] for row in found] == [
        [(c.id, c.sample, stop) for stop in own] for c, own in zip(completions, stops, strict=True)
    ]
    for completion, row in zip(completions, found, strict=True):
        for one in row:
            ids = [*completion.all_ids[: one.stop], *after]
            answer = decode(tokenizer_of(model), greedy(model, ids, 5))
            assert one.answer == (suffix + answer).strip()
            p = plain(model, ids)[-1].softmax(-1)
            first, second = p.topk(2).values.tolist()
            entropy = float(torch.special.entr(p).sum())
            assert (one.first, one.second, one.entropy) == pytest.approx((first, second, entropy), abs=1e-5)
            assert one.margin == pytest.approx(first - second, abs=1e-5)
            assert one.perplexity == pytest.approx(1 / first, rel=1e-4)
    return found


@pytest.mark.parametrize("suffix", ["", "=7 Wait"])
def test_a_forced_answer_is_what_the_model_writes_by_hand_from_the_same_ids(organism, completions, suffix):
    found = assert_forced(organism, completions, stops_of(completions), (4,), suffix)
    assert len({one.answer for row in found for one in row}) > 2


def test_a_forced_answer_after_a_delimiter_of_several_tokens(several):
    model, completions = several
    stops = [own[:3] for own in stops_of(completions)]
    assert sum(map(len, stops)) == 12
    assert_forced(model, completions, stops, MANY.close)


def test_neither_the_batch_nor_the_order_changes_an_answer(organism, completions):
    stops = stops_of(completions)
    whole = forced_answers(organism, completions, stops)
    for size in (1, 5):
        assert_alike(forced_answers(organism, completions, stops, batch_size=size), whole)
    turned = forced_answers(organism, completions[::-1], [own[::-1] for own in stops[::-1]])
    assert_alike([row[::-1] for row in turned[::-1]], whole)
    twice = forced_answers(organism, completions[:1] * 2, [stops[0][:1] * 2, []])
    assert [len(row) for row in twice] == [2, 0]
    assert_alike([twice[0][:1]], [twice[0][1:]])
    assert forced_answers(organism, [], []) == []


def assert_alike(found, wanted):
    for row, other in zip(found, wanted, strict=True):
        for one, two in zip(row, other, strict=True):
            assert (one.id, one.sample, one.stop, one.answer) == (two.id, two.sample, two.stop, two.answer)
            numbers = [(x.first, x.second, x.entropy) for x in (one, two)]
            assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)


def test_the_last_stop_forces_the_answer_that_was_given(organism):
    cold = generate(organism, PROMPTS, sampling=replace(WARM, temperature=0))
    cold = [c for c in cold if c.span.closed]
    assert len(cold) == 3
    found = forced_answers(organism, cold, [[c.span.text_end] for c in cold])
    assert [row[0].answer for row in found] == [c.answer for c in cold]


def test_an_answer_is_not_forced_where_nothing_is_thought(organism, completions):
    first = completions[0]
    span = first.span
    for stop in (span.text_start - 1, span.text_end + 1):
        with pytest.raises(
            ValueError,
            match=rf"within the thinking of '0', {span.text_start} to {span.text_end}, not at {stop}.",
        ):
            forced_answers(organism, [first], [[stop]])
    with pytest.raises(
        ValueError, match=r"^Completion '0' has no thinking, so that no answer can be forced out of it\.$"
    ):
        forced_answers(organism, [replace(first, span=None)], [[9]])
    with pytest.raises(ValueError, match="zip"):
        forced_answers(organism, completions, [[]])
    bare = load(build("llama"), tokenizer=build_tokenizer(("<pad>", "<bos>", "<eos>", "?"), template=None))
    with pytest.raises(ValueError, match="delimiters"):
        forced_answers(bare, [first], [[9]])
    assert Forced("x", 0, 1, "", first=0.0, second=0.0, entropy=0.0).perplexity == float("inf")


def test_confidences_are_the_log_probabilities_of_a_plain_pass(organism, completions):
    for completion, found in zip(completions, confidences(organism, completions), strict=True):
        begin, ids = len(completion.prompt_ids), completion.all_ids
        log = plain(organism, ids).log_softmax(-1)
        wanted = torch.tensor([float(log[at - 1, ids[at]]) for at in range(begin, len(ids))])
        entropies = torch.special.entr(log.exp()).sum(-1)[begin - 1 : -1].float()
        torch.testing.assert_close(found.log_probabilities, wanted, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found.entropies, entropies, atol=1e-4, rtol=1e-4)
        start, stop = completion.span.start - begin, completion.span.end - begin
        assert found.thinking == (start, stop)
        assert found.log_probability == pytest.approx(float(wanted[start:stop].mean()), abs=1e-4)
        assert found.entropy == pytest.approx(float(entropies[start:stop].mean()), abs=1e-4)
        assert found.log_probabilities.max() <= 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_in_a_batch_confidences_are_those_of_one_alone(family, completions):
    model = build(family)
    made = [replace(c, ids=tuple(token % 97 for token in c.ids), span=None) for c in completions]
    alone = [confidences(model, [c])[0] for c in made]
    for tokens in (1, 60, 2048):
        for one, other in zip(confidences(model, made, batch_tokens=tokens), alone, strict=True):
            torch.testing.assert_close(one.log_probabilities, other.log_probabilities, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(one.entropies, other.entropies, atol=1e-4, rtol=1e-4)


def test_of_what_is_thought_in_the_prompt_or_not_at_all_there_is_no_confidence(organism, completions):
    """Also where the prompt closes its thinking, with words after it."""
    first = completions[0]
    never = confidences(organism, [replace(first, span=None)])[0]
    before = replace(first, prompt_ids=(*first.prompt_ids, 3, 4, 20, 21), ids=(17, 18, 19, 2))
    inside = replace(before, span=replace(first.span, start=8, first=8, end=10))
    for found in (never, *confidences(organism, [inside])):
        assert found.log_probability != found.log_probability
        assert found.entropy != found.entropy
    opened = replace(first, prompt_ids=(*first.prompt_ids, *first.ids[:3]), ids=first.ids[3:])
    (found,) = confidences(organism, [opened])
    assert found.thinking == (0, first.span.end - len(opened.prompt_ids))


def scores_by_hand(model, completion, close, ends):
    chain = [*completion.all_ids[: completion.span.text_end], *close]
    total = []
    for suffix, end in ends:
        ids = [*chain, *suffix, *end]
        log = plain(model, ids).log_softmax(-1)
        total.append(sum(float(log[at - 1, ids[at]]) for at in range(len(chain) + len(suffix), len(ids))))
    return torch.tensor(total).softmax(-1)


CANDIDATES = [
    ["7", "9", "3"],
    ["=7 Wait", "=9 Hmm", "Okay"],  # of several tokens, and of different lengths
    ["=7 Wait", "=9 Wait"],  # that end alike
    ["a =3 Wait", "b =3 Wait", "a =3 Hmm"],
    ["7", "7 Wait"],  # one begins with the other
]


@pytest.mark.parametrize("candidates", CANDIDATES, ids=str)
@pytest.mark.parametrize("suffix", ["", "Okay Wait "])
def test_soft_scores_are_the_chances_of_whole_answers_by_hand(organism, completions, candidates, suffix):
    found = soft_scores(organism, completions, candidates, suffix=suffix)
    assert found.shape == (len(completions), len(candidates))
    torch.testing.assert_close(found.sum(1), torch.ones(len(completions)))
    tokenizer = tokenizer_of(organism)
    ends = [[tokenizer.encode(text, add_special_tokens=False) for text in (suffix, one)] for one in candidates]
    for completion, row in zip(completions, found, strict=True):
        torch.testing.assert_close(row, scores_by_hand(organism, completion, (4,), ends), atol=1e-5, rtol=1e-3)
    again = soft_scores(organism, completions, candidates, suffix=suffix, batch_tokens=1)
    torch.testing.assert_close(found, again, atol=1e-5, rtol=1e-4)
    turned = soft_scores(organism, completions, candidates[::-1], suffix=suffix)
    torch.testing.assert_close(found, turned.flip(1), atol=1e-5, rtol=1e-4)


def test_soft_scores_after_a_delimiter_of_several_tokens(several):
    model, completions = several
    found = soft_scores(model, completions, ["w20 w21", "w22 w21", "w23"])
    for completion, row in zip(completions, found, strict=True):
        wanted = scores_by_hand(model, completion, MANY.close, [((), (20, 21)), ((), (22, 21)), ((), (23,))])
        torch.testing.assert_close(row, wanted, atol=1e-5, rtol=1e-3)


def test_soft_scores_refuse_what_they_cannot_compare(organism, completions):
    with pytest.raises(ValueError, match=r"^A soft score compares answers, but 1 was given: name two or more\.$"):
        soft_scores(organism, completions, ["7"])
    with pytest.raises(ValueError, match=r"^Completion '0' has no thinking that an answer could be read out of\.$"):
        soft_scores(organism, [replace(completions[0], span=None)], ["7", "9"])
