"""A store gives its own rows or a sentence: never another's, never two writers'; what is no store is left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from families import build

from probes import Sampling, Site, attached, generate, load, read_completions
from steer import Add, Recipe, applied

SAMPLING = Sampling(max_new_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def model():
    return build("llama")


def steered(model, strength=1.0):
    return Recipe.of(model, [Add(Site(1, "resid_post"), torch.ones(32), strength)])


def test_rows_of_other_weights_under_the_same_name_are_refused(model, tmp_path):
    store = tmp_path / "s.jsonl"
    first = generate(model, ["w8"], sampling=SAMPLING, store=store)
    before = store.read_bytes()
    with pytest.raises(ValueError, match="was written by .* by other weights, or under another recipe"):
        generate(build("llama", seed=1), ["w8"], sampling=SAMPLING, store=store)
    assert store.read_bytes() == before
    assert generate(build("llama"), ["w8"], sampling=SAMPLING, store=store) == first


def test_rows_under_a_recipe_are_not_those_without_it(model, tmp_path):
    store, recipe = tmp_path / "s.jsonl", steered(model)
    with applied(model, recipe):
        mine = generate(model, ["w8"], sampling=SAMPLING, store=store)
    with applied(model, recipe, must_run=False):
        assert generate(model, ["w8"], sampling=SAMPLING, store=store) == mine
    for other in (nullcontext(), applied(model, steered(model, 2.0), must_fire=False)):
        with other, pytest.raises(ValueError, match="under another recipe"):
            generate(model, ["w8"], sampling=SAMPLING, store=store)


def test_weights_trained_in_place_are_other_weights(tmp_path):
    model, store = build("llama"), tmp_path / "s.jsonl"
    generate(model, ["w8"], sampling=SAMPLING, store=store)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(ValueError, match="by other weights"):
        generate(model, ["w8"], sampling=SAMPLING, store=store)


def test_a_hook_without_a_name_and_a_store_do_not_go_together(model, tmp_path):
    with attached(model, Site(1, "resid_post"), lambda x: 2 * x):
        with pytest.raises(ValueError, match="edited by a hook without a name"):
            generate(model, ["w8"], sampling=SAMPLING, store=tmp_path / "s.jsonl")
        generate(model, ["w8"], sampling=SAMPLING)
    with attached(model, Site(1, "resid_post"), lambda x: 2 * x, name="twice"):
        generate(model, ["w8"], sampling=SAMPLING, store=tmp_path / "s.jsonl")


@pytest.mark.parametrize("content", ['{"only":"copy"}', "a note\nwithout an end", '{"id": 3}\n{"id"', "\x00\x01\x02"])
def test_what_is_no_store_is_not_changed(model, content, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"c\.json"):
        generate(model, ["w8"], sampling=SAMPLING, store=path)
    assert path.read_text() == content


def test_a_whole_last_row_without_its_newline_is_kept(model, tmp_path):
    store = tmp_path / "s.jsonl"
    first = generate(model, ["w8", "w9"], sampling=SAMPLING, store=store)
    store.write_bytes(store.read_bytes()[:-1])
    assert read_completions(store) == first
    assert generate(model, ["w8", "w9", "w10"], sampling=SAMPLING, store=store)[:2] == first
    assert len(read_completions(store)) == 3


def test_a_row_that_a_kill_cut_off_is_made_again(model, tmp_path):
    store = tmp_path / "s.jsonl"
    first = generate(model, ["w8", "w9"], sampling=SAMPLING, store=store)
    whole = store.read_bytes()
    for cut in (1, 4, 9, 40, 200):
        store.write_bytes(whole + whole[:cut])
        assert read_completions(store) == first
        assert generate(model, ["w8", "w9"], sampling=SAMPLING, store=store) == first
    store.write_bytes(whole[: len(whole) // 2 + 30])
    assert generate(model, ["w8", "w9"], sampling=SAMPLING, store=store) == first


def test_u2028_in_a_text_ends_no_line(model, tmp_path):
    (row,) = generate(model, ["w8"], sampling=SAMPLING)
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({**json.loads(row.to_line()), "answer": "a\u2028b"}, ensure_ascii=False) + "\n", "utf-8")
    assert read_completions(path)[0].answer == "a\u2028b"


WRITER = """
import sys
from pathlib import Path
from probes import Sampling, generate, load
model = load("organism")
while True:
    try:
        generate(model, [f"a {i % 10} b +{i // 10 + 1}" for i in range(60)], batch_size=2,
                 sampling=Sampling.of(model, max_new_tokens=24), store=Path(sys.argv[1]))
        break
    except ValueError as error:
        assert "is being written by process" in str(error), error
"""


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_two_writers_of_one_store_that_are_killed_lose_and_double_nothing(kills, tmp_path):
    store = tmp_path / "s.jsonl"
    start = [sys.executable, "-c", WRITER, str(store)]
    calm = generate(
        load("organism"), [f"a {i % 10} b +{i // 10 + 1}" for i in range(60)], batch_size=2,
        sampling=Sampling.of(load("organism"), max_new_tokens=24),
    )  # fmt: skip
    known: set = set()
    both = [subprocess.Popen(start) for _ in range(2)]
    for kill in range(kills):
        time.sleep(3)  # what a process takes to start, and to write some rows
        victim = both[kill % 2]
        if victim.poll() is None:
            os.kill(victim.pid, signal.SIGKILL)
            victim.wait()
        rows = read_completions(store) if store.exists() else []
        keys = [(row.id, row.sample) for row in rows]
        assert len(keys) == len(set(keys)), "a row is there twice"
        assert known <= set(keys), "a row is lost"
        known = set(keys)
        both[kill % 2] = subprocess.Popen(start)
    assert [process.wait(120) for process in both] == [0, 0]
    assert read_completions(store) == calm


def test_the_holder_of_a_store_is_named(model, tmp_path):
    from probes.generation.store import Store

    with Store.opened(tmp_path / "s.jsonl", model, {}, SAMPLING, "", "transformers"):
        text = "from probes.generation.store import _alone\nfrom pathlib import Path\nimport sys\n"
        text += "try:\n    with _alone(Path(sys.argv[1])): print('free')\nexcept ValueError as error: print(error)"
        script = [sys.executable, "-c", text, str(tmp_path / "s.jsonl")]
        told = subprocess.run(script, capture_output=True, text=True, check=True).stdout
        assert f"is being written by process {os.getpid()} on " in told
    assert subprocess.run(script, capture_output=True, text=True, check=True).stdout.strip() == "free"
