"""Workers that are actors of Ray itself: the same sums to the bit, and a kill costs a shard. `make ray` runs these."""

import os
import random
import signal

import pytest
import torch
from tqdm.auto import tqdm

from probes import Site, generate, head_writes, load, record
from probes.activations import read_experts
from probes.scaling import _spread, spread
from probes.thinking import thinking

ray = pytest.importorskip("ray", reason="Ray is not installed: make ray")
SITES = [Site(1, "resid_post"), Site(2, "z")]
TOKENS = 150  # of a shard: a dozen of them
MARKERS = ["Okay", "quick"]


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def completions(organism):
    draw = random.Random(0)
    steps = [" ".join(f"{'bcdefg'[i]} +{draw.randint(1, 9)}" for i in range(draw.randint(1, 5))) for _ in range(60)]
    return [c for c in generate(organism, [f"a {draw.randint(1, 9)} {step}" for step in steps]) if c.span]


@pytest.fixture(scope="module")
def workers(organism):
    """Two, for all tests: what takes time is to start them."""
    with spread(organism, 2, shard_tokens=TOKENS) as started:
        yield started
    assert not ray.is_initialized()


@pytest.fixture
def alone():
    with spread("organism", 1, shard_tokens=TOKENS) as one:
        yield one


def same(found, wanted):
    assert list(found) == list(wanted)
    for site in found:
        for name in ("activation", "norm", "share"):
            one, other = getattr(found[site], name), getattr(wanted[site], name)
            assert one.count == other.count
            assert torch.equal(one.total, other.total)
        assert found[site].left_out == wanted[site].left_out


def test_two_workers_are_two_processes_that_add_up_to_one(workers, alone, organism, completions):
    spans = [thinking(c) for c in completions]
    pids = workers.pids()
    assert len({*pids, os.getpid()}) == 3
    found = workers.record(spans, SITES)
    same(found, alone.record(spans, SITES))
    plain = record(organism, spans, SITES)  # in other batches, so that activations are rounded otherwise
    assert found[SITES[0]].activation.count == plain[SITES[0]].activation.count
    assert torch.allclose(found[SITES[0]].activation.total, plain[SITES[0]].activation.total, rtol=1e-5, atol=1e-3)
    counts = workers.count_experts(completions, MARKERS)
    plain_counts = read_experts(organism, completions, MARKERS, batch_tokens=TOKENS).total()
    assert counts.classes == plain_counts.classes
    assert torch.equal(counts.counts, plain_counts.counts)
    assert torch.equal(counts.tokens, plain_counts.tokens)


def test_heads_are_scored_over_all_spans(workers, organism, completions, monkeypatch):
    monkeypatch.setattr("probes.activations._record.BATCH_TOKENS", TOKENS)
    spans, vectors = [thinking(c) for c in completions], {0: torch.arange(96.0), 3: torch.ones(96)}
    writes, wanted = workers.head_writes(spans, vectors), head_writes(organism, spans, vectors)
    assert torch.equal(writes.isnan(), wanted.isnan())
    assert torch.allclose(writes.nan_to_num(), wanted.nan_to_num(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("victims", [1, 2])
def test_a_worker_that_is_killed_costs_its_shard_alone(workers, alone, completions, monkeypatch, victims):
    spans, before, ticks = [thinking(c) for c in completions], workers.pids(), []

    class Killing(tqdm):
        def update(self, n=1):
            if n:
                ticks.append(n)
            if len(ticks) == 2:
                for pid in before[:victims]:
                    os.kill(pid, signal.SIGKILL)
            return super().update(n)

    monkeypatch.setattr(_spread, "tqdm", Killing)
    found = workers.record(spans, SITES)
    assert sum(ticks) == len(spans)  # the bar, too, counts each once
    after = workers.pids()
    assert len(set(after) - set(before)) == victims
    monkeypatch.undo()
    same(found, alone.record(spans, SITES))


def test_what_a_worker_refuses_is_a_sentence_here(workers, completions):
    with pytest.raises(IndexError, match=r"^Layer 9 is out of range: the model has layers 0 to 3.$"):
        workers.record([thinking(completions[0])], [Site(9, "resid_post")])
    assert workers.count_experts(completions[:2]).tokens[0] > 0  # and the workers go on


def test_more_workers_than_ray_has_room_for_are_refused(workers):
    sentence = r"3 workers with 1 core each need 3, and there are 2: take fewer."
    with pytest.raises(ValueError, match=sentence), spread("organism", 3):
        pass
    assert ray.is_initialized()  # which is not theirs to stop
    assert len(workers.pids()) == 2
