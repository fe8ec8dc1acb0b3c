"""`steer serve` by either engine: answers are the run time's, what is wrong is told, who leaves is let go, it ends.

One server for all that is asked of an engine. vLLM's runs where it is installed, `make vllm`; with `-m slow` the
embedded reasoner is served too.
"""

import importlib.util
import os
import signal
import sys
import time
from contextlib import ExitStack

import pytest

pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'thinksteer[serve]'")

import httpx
import served as s

_VLLM = all(importlib.util.find_spec(name) is not None for name in ("vllm", "thinksteer_vllm"))
_NEEDS = pytest.mark.skipif(not _VLLM, reason="needs vLLM and its plugin: make vllm")
SERVERS = [
    pytest.param((engine, model), id=f"{engine}-{model}", marks=[*marks, *([_NEEDS] if engine == "vllm" else [])])
    for model, marks in (("tiny", ()), ("reasoner", (pytest.mark.slow,)))
    for engine in ("transformers", "vllm")
]


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    engine, model = request.param
    with s.serving(engine, s.MODELS[model](folder), folder, folder / "log.txt") as found:
        yield found


def test_fifty_at_once_each_get_what_the_run_time_writes(server, capsys):
    bodies = [s.body_of(server.served, i) for i in range(50)]
    began = time.monotonic()
    answers = s.at_once(server, bodies)
    seconds = time.monotonic() - began
    count, wrong = s.verdicts(server.served, bodies, answers)
    with capsys.disabled():
        sys.stdout.write(f"\n{server.engine}, {server.served.name}: {dict(count)} of 50 in {seconds:.1f} s\n")
    assert wrong == []
    assert count["equal"] >= 40
    plain = [s.ids_of(a) for b, a in zip(bodies, answers, strict=True) if s.steering_of(b)[0] is None]
    assert len(plain) >= 12
    for answer in answers[:8]:
        shown = s.words_of(server.served, s.ids_of(answer))
        assert _letters(s.text_of(answer)) == _letters(shown)


def _letters(text):
    """Ours tells the thinking apart from the answer, and vLLM's does not."""
    return "".join(text.replace("</think>", "").split())


def test_a_recipe_changes_what_is_written_and_is_counted(server):
    before, found = s.touched(server), {}
    for name in (None, *server.served.recipes):
        body = s.body_of(server.served, 0, stream=False, **({} if name is None else {"thinksteer": name}))
        with server.client as client:
            found[name] = s.ids_of(client.post(s.CHAT, json=body))
    assert len({tuple(ids) for ids in found.values()}) == 1 + len(server.served.recipes)
    now = s.touched(server)
    moved = {name for (name, *_), n in now.items() if n > sum(m for key, m in before.items() if key[0] == name)}
    assert set(server.served.recipes) >= moved
    assert sum(now.values()) > sum(before.values())


def test_what_is_served_is_told(server):
    with server.client as client:
        assert [row["id"] for row in client.get("/v1/models").json()["data"]] == [server.served.name]
        listed = {row["name"]: row for row in client.get("/thinksteer/recipes").json()["data"]}
        fired = client.get("/thinksteer/fired").json()["recipes"]
    recipes = server.served.recipes
    assert {name: row["fingerprint"] for name, row in listed.items()} == {
        n: r.fingerprint() for n, r in recipes.items()
    }
    assert {key for row in listed.values() for key in row} == {"name", "method", "steps", "fingerprint", "model"}
    assert listed["thinking"]["steps"][0].endswith(
        f"scope thinking, strength {server.served.recipes['thinking'].steps[0].intervention.strength:g}"
    )
    assert listed["thinking"]["model"]["fingerprint"] == recipes["thinking"].model["fingerprint"]
    assert set(fired) == set(recipes)
    row = fired["thinking"][0]
    assert list(row) == ["step", "site", "kind", "scope", "phase", "tokens", "mean_ratio"]
    assert (row["step"], row["kind"], row["scope"], row["phase"]) == (0, "add", "thinking", "thinking")
    assert row["site"] == str(recipes["thinking"].steps[0].intervention.site)
    assert (row["mean_ratio"] is None) == (server.engine == "vllm")


WRONG = {
    "unknown": ({"thinksteer": "slower"}, "There is no recipe 'slower'."),
    "no text": ({"thinksteer": 3}, "3"),
    "no number": ({"thinksteer": "thinking", "thinksteer_strength": "much"}, "number"),
    "infinite": ({"thinksteer": "thinking", "thinksteer_strength": 1e40}, "float32"),
    "alone": ({"thinksteer_strength": 2.0}, "recipe"),
    "two": ({"thinksteer": "thinking", "vllm_xargs": {"thinksteer": "mixed"}}, "in vllm_xargs"),
    "beams": ({"thinksteer": "thinking", "use_beam_search": True}, "eam search"),
    "long": ({"thinksteer": "thinking", "messages": "long"}, "tokens"),
    "model": ({"model": "gpt"}, "gpt"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_told_in_a_sentence_and_the_next_is_answered(server, what):
    more, sentence = dict(WRONG[what][0]), WRONG[what][1]
    if more.get("messages") == "long":
        n = server.served.model.config.max_position_embeddings if server.engine != "vllm" else server.served.positions
        more["messages"] = [{"role": "user", "content": f"{server.served.words[0]} " * (n // 3)}]
    good = s.body_of(server.served, 4, stream=False)
    with server.client as client:
        answer = client.post(s.CHAT, json={**s.body_of(server.served, 0), **more})
        assert answer.status_code == (404 if what == "model" and server.engine == "vllm" else 400), answer.text
        assert sentence in answer.json()["error"]["message"]
        assert s.ids_of(client.post(s.CHAT, json=good)) == list(s.expected(server.served, good).ids)


def test_twenty_who_go_away_leave_no_row(server):
    bodies = [
        s.body_of(server.served, i, stream=True, max_tokens=server.served.long, thinksteer="thinking", vllm_xargs={})
        for i in range(20)
    ]
    bodies = [{key: value for key, value in body.items() if key != "thinksteer_strength"} for body in bodies]
    s.cut_off(server, bodies)
    assert s.quiet(server)
    after = s.body_of(server.served, 1, stream=False)
    with server.client as client:
        assert s.ids_of(client.post(s.CHAT, json=after)) == list(s.expected(server.served, after).ids)


def test_a_key_is_asked_for(server):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for headers in ({}, {"authorization": "Bearer close"}, {"authorization": s.KEY}):
            assert client.post(s.CHAT, json=s.body_of(server.served, 0), headers=headers).status_code == 401
            for path in ("/thinksteer/recipes", "/thinksteer/fired"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["message"].startswith("The API key is missing or wrong")
        assert client.get("/health").status_code == 200
    assert server.told["api_key"] is True
    listed = [f"/proc/{pid}/cmdline" for pid in _group(server)]
    assert not any(s.KEY.encode() in open(path, "rb").read() for path in listed)  # noqa: PTH123, SIM115


def test_vllm_was_probed_before_it_was_ready(server):
    if server.engine != "vllm":
        assert "probe" not in server.told
        return
    rows = {row["recipe"]: row for row in server.told["probe"]}
    assert set(rows) == {"none", *server.served.recipes}
    assert all(row["equal"] + row["equal but for a tie"] == 2 for row in rows.values())
    assert all(rows[name]["tokens touched"] > 0 for name in server.served.recipes)


def test_a_signal_ends_all_within_ten_seconds(server):
    """The last: some are being answered."""
    group = _group(server)
    bodies = [s.body_of(server.served, i, stream=True, max_tokens=server.served.long) for i in range(4)]
    with ExitStack() as stack:
        client = stack.enter_context(server.client)
        streams = [stack.enter_context(client.stream("POST", s.CHAT, json=body)) for body in bodies]
        assert all(next(stream.iter_lines()).startswith("data: ") for stream in streams)
        began = time.monotonic()
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert time.monotonic() - began < 10
    time.sleep(0.5)
    assert [pid for pid in group if _lives(pid)] == []


def _group(server):
    """The command and all that it started."""
    found, new = [], [server.process.pid]
    while new:
        pid = new.pop()
        found.append(pid)
        try:
            tasks = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208
            for task in tasks:
                with open(f"/proc/{pid}/task/{task}/children") as file:  # noqa: PTH123
                    new += [int(word) for word in file.read().split()]
        except FileNotFoundError:
            continue
    return found


def _lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
