"""Shards add up to the whole, whoever reads them, in whatever order they come, and however often a reader dies.

Ray itself is in `test_scaling_ray.py`; here one of forty lines stands in for it, whose actors die where they are told.
"""

import json
import os
import random
import sys
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probes import Site, attached, generate, head_writes, load, record
from probes.activations import ExpertCounts, Moments, Recorded, read_experts
from probes.activations._record import batches
from probes.scaling import load_counts, load_recorded, pools, save_statistics, spread
from probes.scaling.reader import Identity, Reader, Source
from probes.scaling.shards import shards_of_completions, shards_of_spans
from probes.thinking import Span, first_thought, thinking
from steer.cli.main import app

SITES = [Site(1, "resid_post"), Site(2, "z"), Site(0, "mlp_out")]
SOURCE = Source("organism", None, "auto", None, None, 1, None)


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def completions(organism):
    draw = random.Random(0)
    steps = [" ".join(f"{'bcdefg'[i]} +{draw.randint(1, 9)}" for i in range(draw.randint(1, 5))) for _ in range(24)]
    return [c for c in generate(organism, [f"a {draw.randint(1, 9)} {step}" for step in steps]) if c.span]


def bits(found):
    """All numbers of statistics, as they are."""
    if isinstance(found, ExpertCounts):
        return [found.counts, found.tokens]
    own = [part for one in found.values() for part in (one.activation, one.norm, one.share)]
    return [torch.tensor([one.left_out for one in found.values()]), *(torch.tensor([m.count]) for m in own),
            *(m.total for m in own)]  # fmt: skip


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


# The sums

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


@st.composite
def recorded(draw):
    def moments():
        row = draw(st.lists(NUMBERS, min_size=3, max_size=3))
        return Moments(draw(st.integers(0, 1 << 40)), torch.tensor(row, dtype=torch.float64))

    return Recorded(moments(), moments(), draw(st.integers(0, 1 << 40)), moments())


TWELVE = st.lists(st.integers(0, 1 << 50), min_size=12, max_size=12)


def counted(numbers):
    return ExpertCounts((0, 3), ("all", "answer"), torch.tensor(numbers).reshape(2, 2, 3), torch.tensor(numbers[:2]))


@given(recorded(), recorded(), recorded())
def test_moments_merge_in_any_grouping(a, b, c):
    left, right = (a + b) + c, a + (b + c)
    assert left.left_out == right.left_out
    for name in ("activation", "norm", "share"):
        one, other = getattr(left, name), getattr(right, name)
        size = sum(getattr(x, name).total.abs() for x in (a, b, c))
        assert one.count == other.count
        assert bool(((one.total - other.total).abs() <= 1e-12 * size).all())


@given(st.tuples(TWELVE, TWELVE, TWELVE))
def test_counts_merge_in_any_grouping_and_order_to_the_bit(drawn):
    a, b, c = map(counted, drawn)
    assert same((a + b) + c, a + (b + c))
    assert same(a + b, b + a)


# The shards

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(LENGTHS, st.integers(1, 90))
def test_shards_are_the_batches_of_one_process_and_hold_each_span_once(organism, lengths, tokens):
    spans = [Span((7,) * length, 0, 1 + i % length) for i, length in enumerate(lengths)]
    shards = shards_of_spans(spans, tokens)
    assert sorted(map(id, spans)) == sorted(id(span) for shard in shards for span in shard)
    texts = list({span.ids: span for span in spans}.values())
    read = [[texts[row].ids for row in rows] for rows in batches(organism, texts, tokens)]
    assert [list({span.ids: 0 for span in shard}) for shard in shards] == read


def test_completions_are_in_one_shard_each(completions):
    shards = shards_of_completions(completions, 100)
    assert len(shards) > 3
    assert sorted(c.id for c in completions) == sorted(c.id for shard in shards for c in shard)


@pytest.mark.parametrize("tokens", [70, 16_384])
def test_one_worker_reads_what_a_plain_process_reads(organism, completions, tokens, monkeypatch):
    """To the bit, where the plain one reads the same batches, and with as many threads."""
    monkeypatch.setattr("probes.activations._record.BATCH_TOKENS", tokens)
    spans = [rule(c) for rule in (thinking, first_thought) for c in completions]
    with spread("organism", 1, shard_tokens=tokens) as workers:
        found, counts = workers.record(spans, SITES), workers.count_experts(completions, ["Okay"])
        writes = workers.head_writes(spans, {0: torch.arange(96.0), 3: torch.ones(96)})
        assert workers.pids() == [os.getpid()]
    assert same(found, record(organism, spans, SITES))
    assert same(counts, read_experts(organism, completions, ["Okay"], batch_tokens=tokens).total())
    alone = head_writes(organism, spans, {0: torch.arange(96.0), 3: torch.ones(96)})
    assert torch.equal(writes.nan_to_num(-1), alone.nan_to_num(-1))


def test_shards_are_added_up_in_their_order_whichever_comes_first(completions):
    class Backwards:
        """A pool whose last shard comes first."""

        def __init__(self, pool):
            self.identity, self.pids, self.forwards = pool.identity, pool.pids, pool.run

        def run(self, method, jobs):
            return reversed(list(self.forwards(method, jobs)))

    spans = [thinking(c) for c in completions]
    with spread("organism", 1, shard_tokens=70) as workers:
        other = replace(workers, pool=Backwards(workers.pool))
        assert same(other.record(spans, SITES), workers.record(spans, SITES))


def test_a_reading_that_was_killed_goes_on_where_it_was(completions, tmp_path, monkeypatch):
    spans, read = [thinking(c) for c in completions], []

    def dies(self, shard, *rest, own=Reader.record):
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(len(shard))
        return own(self, shard, *rest)

    with spread("organism", 1, shard_tokens=100) as workers:
        whole = workers.record(spans, SITES)
    with monkeypatch.context() as patch, spread("organism", 1, shard_tokens=100, store=tmp_path) as workers:
        patch.setattr(Reader, "record", dies)
        with pytest.raises(KeyboardInterrupt):
            workers.record(spans, SITES)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    with spread("organism", 1, shard_tokens=100, store=tmp_path) as workers:
        monkeypatch.setattr(
            Reader,
            "record",
            lambda self, shard, *rest, own=Reader.record: read.append(len(shard)) or own(self, shard, *rest),
        )
        assert same(workers.record(spans, SITES), whole)
        assert sum(read) == len(spans)
        assert same(workers.record(spans, SITES), whole)
        assert sum(read) == len(spans)  # nothing was left to read
        workers.record(spans, SITES, keep_sinks=True)
        assert sum(read) == 2 * len(spans)  # which is another reading


def test_statistics_are_kept_to_the_bit_and_taken_for_nothing_else(organism, completions, tmp_path):
    found = record(organism, [thinking(c) for c in completions], [*SITES, Site(1, "z", head=2)])
    counts = read_experts(organism, completions, ["Okay", "Nonsense"]).total()
    save_statistics(tmp_path / "a.safetensors", found, {"model": "organism"})
    save_statistics(tmp_path / "b.safetensors", counts)
    assert same(load_recorded(tmp_path / "a.safetensors"), found)
    assert list(load_recorded(tmp_path / "a.safetensors")) == list(found)
    back = load_counts(tmp_path / "b.safetensors")
    assert same(back, counts)
    assert (back.layers, back.classes, back.lacking) == (counts.layers, counts.classes, ("Nonsense",))
    with pytest.raises(ValueError, match=r"a.safetensors holds recorded, not expert counts. Name another file."):
        load_counts(tmp_path / "a.safetensors")
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"c.safetensors is not a whole safetensors file"):
        load_recorded(tmp_path / "c.safetensors")


# The workers, of a Ray that dies on purpose


class Gone(Exception):
    """RayError: the process is no more."""


class Told(Gone):
    """RayTaskError: the process lives, and what ran in it raised."""

    cause: Exception


class Actor:
    alive = True


class Ray:
    """Calls wait until they are asked for, and are taken in an order that is drawn; some end their actor."""

    def __init__(self, draw, deaths=(), cpus=4):
        self.draw, self.deaths, self.cpus, self.done, self.open = draw, list(deaths), cpus, [], True

    def is_initialized(self):
        return False

    def init(self, **options):
        self.options = options

    def cluster_resources(self):
        return {"CPU": self.cpus}

    def shutdown(self):
        self.open = False

    def kill(self, actor):
        actor.alive = False

    def remote(self, **_):
        def kind(reader):
            def start(source):
                actor = Actor()
                inner = reader(source)
                for name in ("load", "work"):
                    setattr(actor, name, SimpleNamespace(remote=lambda *job, at=name: (actor, getattr(inner, at), job)))
                return actor

            return SimpleNamespace(remote=start)

        return kind

    def wait(self, calls, num_returns):
        assert num_returns == 1
        return [self.draw(calls)], []

    def get(self, call):
        actor, method, job = call
        if actor.alive and self.deaths and self.deaths.pop():
            actor.alive = False
        if not actor.alive:
            raise Gone
        try:
            return method(*job)
        except ValueError as error:
            told = Told()
            told.cause = error
            raise told from error


class Worker:
    """In place of a `Reader`."""

    def __init__(self, source):
        self.source = source

    def load(self):
        return Identity(self.source.name, "float32")

    def work(self, number):
        if number < 0:
            raise ValueError("It cannot be read.")
        return number * number


@pytest.fixture
def fake(monkeypatch):
    def install(ray, worker=Worker):
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.exceptions", SimpleNamespace(RayError=Gone, RayTaskError=Told))
        monkeypatch.setattr(pools, "Reader", worker)
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        return ray

    return install


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(0, 9), st.lists(st.booleans(), max_size=30))
def test_whoever_dies_each_job_is_done_once(fake, rng, workers, n, deaths):
    ray = fake(Ray(lambda calls: rng.choice(calls), deaths))
    done = None
    with suppress(ChildProcessError), pools.actors(SOURCE, workers, 0, None) as pool:
        done = sorted(pool.run("work", [(i,) for i in range(n)]))
    assert done == [(i, i * i) for i in range(n)] or (done is None and sum(deaths) >= pools.DEATHS)
    assert not ray.open


def test_a_shard_that_ends_every_worker_is_given_up_in_a_sentence(fake):
    fake(Ray(lambda calls: calls[0], [True, False, True, False, True, False]))
    sentence = (
        r"3 workers died one after the other over shard 1 of 2 \(Gone\): there may be too little memory. Give fewer "
        r"workers, or a smaller shard_tokens."
    )
    with pools.actors(SOURCE, 1, 0, None) as pool, pytest.raises(ChildProcessError, match=sentence):
        list(pool.run("work", [(1,), (2,)]))


def test_what_a_worker_refuses_is_told_as_it_was_said(fake):
    fake(Ray(lambda calls: calls[0]))
    with pools.actors(SOURCE, 2, 0, None) as pool, pytest.raises(ValueError, match=r"^It cannot be read.$"):
        list(pool.run("work", [(1,), (-2,)]))


def test_workers_that_load_two_models_are_refused(fake):
    class Other(Worker):
        def load(self, seen=[]):  # noqa: B006
            seen.append(0)
            return Identity(f"print{len(seen)}", "float32")

    ray = fake(Ray(lambda calls: calls[0]), Other)
    with (
        pytest.raises(ValueError, match=r"Two workers loaded two models by the name 'organism' .*print1 and print2"),
        pools.actors(SOURCE, 2, 0, None),
    ):
        pass
    assert not ray.open


def test_a_ray_of_our_own_is_small_and_of_this_machine(fake):
    ray = fake(Ray(lambda calls: calls[0]))
    with pools.actors(SOURCE, 2, 0, None):
        assert (ray.options["address"], ray.options["num_cpus"]) == ("local", 2)
        assert not ray.options["include_dashboard"]
    ray = fake(Ray(lambda calls: calls[0], cpus=8))
    with pools.actors(SOURCE, 6, 0, "auto"):
        assert set(ray.options) == {"address", "log_to_driver", "logging_level"}
    fake(Ray(lambda calls: calls[0], cpus=4))
    with (
        pytest.raises(ValueError, match="6 workers with 1 core each need 6, and there are 4"),
        pools.actors(SOURCE, 6, 0, "auto"),
    ):
        pass


# Refusals


def refused(kind, sentence, *arguments, **options):
    with pytest.raises(kind, match=sentence), spread(*arguments, **options):
        pass


def test_refusals_are_sentences(organism, monkeypatch):
    refused(ValueError, r"workers is 0, and must be at least 1.", "organism", 0)
    refused(ValueError, r"shard_tokens is 0, and must be at least 1.", "organism", 1, shard_tokens=0)
    refused(ValueError, r"gpus is -1, and must be 0 or more.", "organism", 1, gpus=-1)
    refused(ValueError, r"The model is loaded, and has its own dtype: give dtype with a name alone.", organism, 1,
            dtype="float32")  # fmt: skip
    with spread("organism", 1) as workers:
        with pytest.raises(ValueError, match=r"Activations are read of spans at sites, but there is none."):
            workers.record([], SITES)
        with pytest.raises(ValueError, match=r"Experts are read off completions, but there is none."):
            workers.count_experts([])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    refused(ValueError, r"1 worker with 3 cores each needs 3, and there are 2: take fewer.", "organism", 1, cpus=3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(ValueError, r"1 worker with 2 GPUs each needs 2, and there is 1: take fewer.", "organism", 1, gpus=2)
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(ImportError, r"Several workers are actors of Ray: pip install 'thinksteer\[ray\]'.", "organism", 2)


def test_a_model_that_no_worker_could_load_is_refused(organism):
    built = type(organism)(organism.config.__class__(**{**organism.config.to_dict(), "_name_or_path": ""}))
    built.config._name_or_path = ""
    from probes.model import tokenizer_of

    refused(ValueError, r"The model was built here, so that no worker can load it by name: save it to a folder",
            load(built, tokenizer=tokenizer_of(organism)), 1)  # fmt: skip
    with attached(organism, Site(1, "resid_post"), lambda x: 2 * x):
        refused(ValueError, r"The model is edited now, and those that the workers load would not be", organism, 1)
    changed = load("organism")
    with torch.no_grad():
        changed.get_input_embeddings().weight.add_(1)
    refused(ValueError, r"A worker loaded other weights by the name 'organism' than the model that was given has",
            changed, 1)  # fmt: skip


def test_threads_are_given_back():
    torch.set_num_threads(2)
    try:
        with spread("organism", 1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# The commands


def test_the_commands_write_what_the_library_sums_up(organism, completions, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from probes import write_completions

    write_completions(tmp_path / "c.jsonl", completions)
    app(["record", "organism", "c.jsonl", "--site", "L1.resid_post", "-o", "s.safetensors", "--json"],
        standalone_mode=False)  # fmt: skip
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["sites"]["L1.resid_post"]["spans"] == len(completions)
    site = Site(1, "resid_post")
    assert same(load_recorded(tmp_path / "s.safetensors"), record(organism, [thinking(c) for c in completions], [site]))
    app(["experts", "organism", "c.jsonl", "--marker", "Okay", "--marker", "Nope", "-o", "e.safetensors", "--json"],
        standalone_mode=False)  # fmt: skip
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    counts = read_experts(organism, completions, ["Okay"]).total()
    assert facts["lacking"] == ["Nope"]
    assert facts["tokens"] == dict(zip(counts.classes, counts.tokens.tolist(), strict=True))
    assert same(load_counts(tmp_path / "e.safetensors"), counts)
