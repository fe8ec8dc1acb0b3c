"""What is followed pass by pass is the paper's formula on all hidden states: written or read again, in any batch."""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import build, build_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList

from probes import Sampling, generate, load
from probes.activations import following, read_trajectories
from probes.activations import trajectories as trajectories_file
from probes.activations._meter import Follower, Meter
from probes.activations.trajectories import thinking_bounds
from probes.model.delimiters import Delimiters, thinking_span
from probes.model.hooks import hook_inputs
from probes.rows import Rows
from probes.thinking.phases import Clock
from steer.decoding import Budget, Controlled

PROMPTS = ["a 3 b +4 c *7", "a 3 quick", "a 5 b -2 c +9 d *2 e +1", "b +4", "a 3 b +4 c *7 d -2"]
WARM = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=40)
DELIMITERS = {
    "one token": Delimiters((3,), (4,), (5,), (1,)),
    "several tokens": Delimiters((6, 7), (8, 9, 8, 10), (5,), (1,)),
}
WORDS = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "?", *(f"w{i}" for i in range(6, 11)), "Wait", "Well")
FAMILIES = {"llama": "several tokens", "gemma2": "several tokens", "qwen3_moe": "one token", "gpt2": "several tokens"}


class Babble(LogitsProcessor):
    """A decoding: any of a few tokens, with one chance each."""

    name = "babble"

    def __init__(self, tokens):
        self.tokens, self.rows = torch.tensor(tokens), Rows(None, (), ())

    def begin(self, mask):  # noqa: ARG002
        return self

    def turn(self, rows, mask):  # noqa: ARG002
        self.rows = rows

    def processors(self, draw):
        return LogitsProcessorList([self, *draw])

    def events(self):
        return [() for _ in self.rows.numbers]

    def __call__(self, input_ids, scores):  # noqa: ARG002
        return torch.full_like(scores, -torch.inf).index_fill(1, self.tokens, 0.0)


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def completions(organism):
    return generate(organism, PROMPTS, samples=3, sampling=WARM)


def babbler(family, kind="one token"):
    """A tiny model with delimiters, and what it babbles."""
    delimiters = DELIMITERS[kind]
    pieces = {*delimiters.open, *delimiters.close}
    return load(build(family), tokenizer=build_tokenizer(WORDS), delimiters=delimiters), (*pieces, 1, 2, 5, 11, 20, 21)


def babbled(model, tokens, *, batch_size=64, opened=True, samples=3, new=24):
    """Chains of every kind: closed, cut, never opened, opened twice."""
    prefill = DELIMITERS["several tokens" if 6 in tokens else "one token"].open if opened else ()
    return generate(
        model, ["w20 w21 w22", "w20", "w23 w24"], samples=samples, prefill=prefill, batch_size=batch_size,
        sampling=replace(WARM, max_new_tokens=new), decoding=Babble(tokens),
    )  # fmt: skip


@torch.no_grad()
def by_hand(model, completion, segment):
    """The paper's code in NumPy, on all hidden states of one plain pass."""
    span, ids = completion.span, completion.all_ids
    start, stop = (0, 0) if span is None else (max(len(completion.prompt_ids), span.first), min(span.end, len(ids) - 1))
    found = {"tokens": max(stop - start, 0)}
    states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1:]
    x = np.stack([layer[0].double().numpy() for layer in states])[:, start : max(start, stop)]
    parts = [x[:, i : i + segment] for i in range(0, x.shape[1], segment)]
    found["segments"] = n = len(parts)
    none = np.full(len(x), np.nan)
    if not n:
        return found | dict.fromkeys(("net", "cumulative", "aligned"), none) | dict.fromkeys(
            ("magnitude", "angle"), np.nan
        ) | {"steps": np.zeros((2, 0, len(x)))}  # fmt: skip
    h = np.stack([part.mean(1) for part in parts])  # segments, layers, d

    def cosine(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    ends = np.linalg.norm(h[:, -1] - h[:, 0], axis=-1)[:, None]
    whole = np.arccos(cosine(h[:, 0], h[:, -1]))[:, None]
    found["magnitude"] = (np.linalg.norm(np.diff(h, axis=1), axis=-1) / ends).mean()
    found["angle"] = (np.arccos(cosine(h[:, 1:], h[:, :-1])) / whole).mean()
    way, moves = h[-1] - h[0], np.diff(h, axis=0)
    lengths = np.linalg.norm(moves, axis=-1)
    found["steps"] = np.zeros((2, n - 1, len(x)))
    for s in range(1, n):
        found["steps"][:, s - 1] = np.linalg.norm(h[s] - h[0], axis=-1) / s, lengths[:s].sum(0)
    if n == 1:
        return found | dict.fromkeys(("net", "cumulative", "aligned"), none)
    return found | {
        "net": np.linalg.norm(way, axis=-1) / (n - 1), "cumulative": lengths.sum(0),
        "aligned": cosine(moves, way).mean(0),
    }  # fmt: skip


def assert_is(chain, wanted, rtol=1e-6, atol=1e-9):
    assert (chain.tokens, chain.segments) == (wanted["tokens"], wanted["segments"])
    for name in ("net", "cumulative", "aligned", "magnitude", "angle"):
        np.testing.assert_allclose(getattr(chain, name), wanted[name], rtol=rtol, atol=atol, err_msg=name)
    steps = wanted["steps"][:, : chain.steps.shape[1]]
    np.testing.assert_allclose(chain.steps, steps, rtol=rtol, atol=atol)


def assert_same(one, other, rtol=1e-5, atol=1e-6):
    kept = min(one.steps.shape[1], other.steps.shape[1])
    assert (one.tokens, one.segment, one.segments) == (other.tokens, other.segment, other.segments)
    for name in ("net", "cumulative", "aligned", "magnitude", "angle"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=rtol, atol=atol, err_msg=name)
    np.testing.assert_allclose(one.steps[:, :kept], other.steps[:, :kept], rtol=rtol, atol=atol)


@pytest.mark.parametrize("segment", [1, 3, 4, 500])
def test_of_the_organism_it_is_the_formula_on_all_hidden_states(organism, completions, segment):
    for completion in completions:
        (chain,) = read_trajectories(organism, [completion], segment=segment)
        assert_is(chain, by_hand(organism, completion, segment))
        assert chain.net.shape == (4,)


@pytest.mark.parametrize(("family", "kind"), FAMILIES.items())
def test_of_any_family_it_is_the_formula_written_or_read_again_in_any_batch(family, kind):
    """Padded, with rows that leave and join, closed and cut and twice opened thinking, the end of several tokens."""
    model, tokens = babbler(family, kind)
    alone = []
    for completion in babbled(model, tokens):
        alone += read_trajectories(model, [completion], segment=3)
        assert_is(alone[-1], by_hand(model, completion, 3))
    assert max(chain.segments for chain in alone) > (3 if kind == "several tokens" else 0)
    for batch_size in (2, 64):
        with following(model, segment=3) as streamed:
            completions = babbled(model, tokens, batch_size=batch_size)
        assert sorted(streamed) == list(range(9))
        for row, chain in enumerate(alone):
            assert_same(streamed[row], chain, rtol=1e-4, atol=1e-4)
    for chain, again in zip(alone, read_trajectories(model, completions, segment=3), strict=True):
        assert_same(again, chain)


@pytest.mark.parametrize("kind", DELIMITERS)
@pytest.mark.parametrize("batch_size", [3, 64])
def test_whatever_the_model_opens_and_closes_what_is_streamed_is_what_is_read_again(kind, batch_size):
    """No opening delimiter at all, a closing one before it, a second block: none of it is read as the thinking."""
    model, tokens = babbler("llama", kind)
    with following(model, segment=2) as streamed:
        completions = babbled(model, tokens, opened=False, batch_size=batch_size, samples=8)
    spans = [c.span for c in completions]
    assert None in spans
    assert any(spans)
    for row, chain in enumerate(read_trajectories(model, completions, segment=2)):
        assert_same(streamed[row], chain, rtol=1e-4, atol=1e-4)


def test_what_fills_a_row_that_ended_in_its_thinking_is_no_thought():
    """In a batch of many, rows that have ended stay until a share of it has."""
    model, tokens = babbler("llama", "several tokens")
    with following(model, segment=2) as streamed:
        completions = babbled(model, tokens, samples=16, new=16)
    assert sum(c.stop == "eos" and not c.span.closed for c in completions) > 5
    for row, chain in enumerate(read_trajectories(model, completions, segment=2)):
        assert_same(streamed[row], chain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("batch_size", "control"), [(1, None), (3, None), (3, Budget(6)), (64, Budget(9, 1))])
def test_followed_while_it_is_written_a_chain_is_what_it_is_read_again(organism, batch_size, control):
    decoding = None if control is None else Controlled(organism, control)
    with following(organism, segment=3, steps=2) as streamed:
        made = generate(organism, PROMPTS, samples=2, sampling=WARM, batch_size=batch_size, decoding=decoding)
    assert sorted(streamed) == list(range(len(made)))
    for row, chain in enumerate(read_trajectories(organism, made, segment=3)):
        assert_same(streamed[row], chain)
        for step in (1, 2):
            assert streamed[row].after(step) == pytest.approx(chain.after(step), rel=1e-5, nan_ok=True)
        assert np.isnan(streamed[row].after(3)["net"]), "the first two steps are kept"


def test_chains_that_ran_into_the_limit_are_followed_to_their_end(organism):
    for limit in (1, 2, 5, 9):
        with following(organism, segment=2) as streamed:
            made = generate(organism, PROMPTS, sampling=replace(WARM, max_new_tokens=limit), batch_size=2)
        assert any(c.truncated for c in made)
        for row, chain in enumerate(read_trajectories(organism, made, segment=2)):
            assert_same(streamed[row], chain)


def test_batches_and_chunks_change_nothing(organism, completions):
    whole = read_trajectories(organism, completions, segment=3)
    for own in (
        {"batch_tokens": 1},
        {"batch_tokens": 60},
        {"chunk": 4},
        {"chunk": 1},
        {"batch_tokens": 90, "chunk": 5},
    ):
        for one, other in zip(read_trajectories(organism, completions, segment=3, **own), whole, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
def test_chunks_through_a_sliding_window_change_nothing(family):
    model, tokens = babbler(family)
    model.config.sliding_window = 6
    made = babbled(model, tokens, samples=2)
    for one, other in zip(
        read_trajectories(model, made, segment=3, chunk=5), read_trajectories(model, made, segment=3), strict=True
    ):
        assert_same(one, other, rtol=1e-4, atol=1e-4)


def test_a_chain_of_one_segment_has_no_way_and_one_of_two_a_straight_one(organism, completions):
    lengths = [stop - start for start, stop in map(thinking_bounds, completions)]
    at = int(np.argmax(lengths))
    (one,) = read_trajectories(organism, [completions[at]], segment=lengths[at])
    assert one.segments == 1
    assert one.steps.shape == (2, 0, 4)
    for name in ("net", "cumulative", "aligned"):
        assert torch.isnan(getattr(one, name)).all()
    assert one.magnitude >= 1, "a way by its parts is as long as the straight one, or longer, over three layers"
    (two,) = read_trajectories(organism, [completions[at]], segment=lengths[at] - 1)
    assert two.segments == 2
    torch.testing.assert_close(two.cumulative, two.net)
    torch.testing.assert_close(two.aligned, torch.ones(4, dtype=torch.float64))
    assert two.scores("paper")["net"] == pytest.approx(two.scores()["net"] / 2)
    for chain in read_trajectories(organism, completions, segment=2):
        if chain.segments > 1:
            share = (chain.segments - 1) / chain.segments
            assert chain.scores("paper")["net"] == pytest.approx(share * chain.scores("code")["net"])
            last = chain.after(chain.segments - 1)
            assert last["net"] == pytest.approx(chain.scores()["net"])
            assert last["cumulative"] == pytest.approx(chain.scores()["cumulative"])
        assert math.isnan(chain.after(chain.segments)["net"])
        assert math.isnan(chain.after(0)["net"])


def test_without_thinking_there_is_nothing_to_read(organism, completions):
    never = replace(completions[0], span=None, thinking=None)
    before, after = completions[0].prompt_ids, completions[0].ids
    closed = thinking_span([*before, 3, 4, 20], after[-2:], DELIMITERS["one token"])
    prefilled = replace(completions[0], prompt_ids=(*before, 3, 4, 20), ids=after[-2:], span=closed, thinking="")
    for chain in read_trajectories(organism, [never, prefilled], segment=3):
        assert (chain.tokens, chain.segments, chain.steps.shape) == (0, 0, (2, 0, 4))
        assert all(math.isnan(value) for norm in ("code", "paper") for value in chain.scores(norm).values())
    (found,) = read_trajectories(organism, [completions[0]], segment=3)
    assert found.tokens == completions[0].thinking_tokens


def test_a_way_that_does_not_move_counts_as_nothing():
    """Of one token again and again in a model without positions, all segments are one point."""
    model, _ = babbler("llama")
    made = babbled(model, (20,), samples=1, new=9)
    for parameter in model.model.layers.parameters():
        parameter.data.zero_()
    (chain,) = read_trajectories(model, made[1:2], segment=2)
    assert chain.segments > 2
    torch.testing.assert_close(chain.cumulative[1:], chain.net[1:] * (chain.segments - 1))


def test_rows_that_a_store_has_are_not_written_and_not_followed(organism, tmp_path):
    path = tmp_path / "chains.jsonl"
    with following(organism, segment=3) as first:
        generate(organism, PROMPTS[:2], ids=["x", "y"], samples=2, sampling=WARM, store=path)
    assert sorted(first) == [0, 1, 2, 3]
    with following(organism, segment=3) as nothing:
        generate(organism, PROMPTS[:2], ids=["x", "y"], samples=2, sampling=WARM, store=path)
    assert nothing == {}
    with following(organism, segment=3) as more:
        made = generate(organism, PROMPTS[:2], ids=["x", "y"], samples=2, sampling=WARM, store=path, batch_size=1)
    assert more == {}
    with following(organism, segment=3) as more:
        made = generate(organism, PROMPTS[:3], ids=["x", "y", "z"], samples=2, sampling=WARM, store=path, batch_size=1)
    again = read_trajectories(organism, made, segment=3)
    assert {4, 5} <= set(more)
    for row, chain in more.items():
        assert_same(chain, again[row])


def test_what_is_kept_of_a_chain_does_not_grow_with_it(organism):
    sizes = defaultdict(set)
    meter = Meter(organism, 2, 3)
    follower = Follower(meter, Clock.of(organism), lambda numbers, chains: None)  # noqa: ARG005

    def look(*_):
        for name, value in vars(follower.chains).items():
            sizes[name].add(tuple(value.shape[1:]))

    with hook_inputs(organism, follower.see), hook_inputs(organism, look), meter.listening():
        generate(organism, PROMPTS, sampling=WARM)
    d_model = organism.config.hidden_size
    for name in ("total", "first", "last", "units"):
        assert sizes[name] == {(4, d_model)}
    assert sizes["steps"] == {(2, 3, 4)}
    assert sizes["tokens"] == sizes["fill"] == {()}


def test_hooks_are_gone_after_it_also_where_it_raises(organism):
    def hooks():
        return sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in organism.modules()
        )  # fmt: skip

    before = hooks()
    with following(organism):
        assert hooks() > before
    assert hooks() == before
    with pytest.raises(ValueError, match="give a list of prompts"), following(organism):
        generate(organism, "a 3")
    assert hooks() == before


def test_what_cannot_be_followed_is_refused(organism, completions, monkeypatch):
    with pytest.raises(
        ValueError, match=r"^A segment of 0 tokens holds nothing: give 1 or more\. The paper's is 500\.$"
    ):
        read_trajectories(organism, completions, segment=0)
    with pytest.raises(ValueError, match="A segment of -1 tokens"), following(organism, segment=-1):
        pass
    plain = load(build("llama"), tokenizer=build_tokenizer(("<pad>", "<bos>", "<eos>", "?"), template=None))
    with pytest.raises(ValueError, match="delimiters"), following(plain):
        pass
    assert read_trajectories(organism, []) == []
    monkeypatch.setattr(organism.generation_config, "use_cache", False)
    with (
        pytest.raises(
            ValueError, match=r"^Chains are followed from pass to pass, but this model writes without a cache"
        ),
        following(organism),
    ):
        pass
    assert trajectories_file.SEGMENT == 500
    (chain,) = read_trajectories(organism, completions[:1], segment=3)
    with pytest.raises((ValueError, TypeError), match="code"):
        chain.scores("text")
