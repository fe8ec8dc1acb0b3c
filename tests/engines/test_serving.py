"""A model over HTTP: each answer is what `generate` gives alone, whoever asks beside it, leaves, or asks nonsense."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from probes import Sampling, Site, generate, load
from probes.generation import _batch
from probes.model import tokenizer_of
from steer import Ablate, Add, Recipe, Step, applied
from steer.cli.main import main
from steer.engines.serving import Address, Service, batches, launch
from steer.engines.serving.app import LARGEST
from steer.recipes import Scope
from steer.runtime import scaled

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'thinksteer[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'thinksteer[serve]'")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPTS = [f"a {i % 9} b +{1 + i % 7} c *{2 + i % 5}{' quick' if i % 3 == 0 else ''}" for i in range(50)]
SLOW = 100  # tokens of a row whose end is held back


@pytest.fixture(scope="module")
def model():
    return load("organism")


@pytest.fixture(scope="module")
def recipes(model):
    noise = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    add = Add(Site(2, "resid_post"), noise[0], 0.7)
    both = (Step(Ablate(Site(1, "resid_post"), noise[1]), Scope("prompt")), Step(add, Scope("thinking", window=(2, 6))))
    return {
        "thinking": Recipe.of(model, [add], scope="thinking"),
        "everywhere": Recipe.of(model, [Add(Site(1, "resid_post"), noise[2], 0.4)]),
        "both": replace(Recipe.of(model, []), steps=both),
    }


@contextmanager
def serving(model, recipes, *, size=8, api_key=None):
    """A server on a free port, its client, and its worker."""
    address = Address(port=0, api_key=api_key)
    service, worker = Service("organism", model, recipes, max_tokens=SLOW), batches.Worker(model, recipes, size)
    listener = launch.listening(address)
    server = launch.server_of(service, worker, address)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=120) as client:
            yield client, worker
    finally:
        server.should_exit = True
        thread.join(20)
        worker.close()
        assert worker.join(20)


@pytest.fixture(scope="module")
def served(model, recipes):
    with serving(model, recipes) as found:
        yield found


@pytest.fixture
def endless(model, monkeypatch):
    """Rows go on to their limit."""
    monkeypatch.setattr(model.generation_config, "suppress_tokens", [2])


def asked(i, **more):
    """A request: by sevens a recipe or none, a strength, a way to draw; often a limit, at times streamed."""
    seven = i // 7
    body = {"messages": [{"role": "user", "content": PROMPTS[i]}], "seed": i, "return_token_ids": True}
    body |= {"temperature": 1.0, "top_k": 20} if seven // 4 else {}
    body |= {"max_tokens": 3 + i % 20} if i % 4 == 0 else {}
    name = (None, "thinking", "everywhere", "both")[seven % 4]
    steering = {} if name is None else {"thinksteer": name, "thinksteer_strength": 0.5 if seven > 4 else 1.0}
    return {**body, **({"vllm_xargs": steering} if i % 2 else steering), "stream": i % 3 == 1, **more}


def steering_of(body):
    keys = {**body, **body.get("vllm_xargs", {})}
    return keys.get("thinksteer"), keys.get("thinksteer_strength", 1.0)


def alone(model, recipes, body):
    """What `generate` gives for it, and what the recipe touched."""
    name, strength = steering_of(body)
    sampling = Sampling.of(model, seed=body["seed"], max_new_tokens=body.get("max_tokens", SLOW))
    sampling = replace(sampling, **{key: body[key] for key in ("temperature", "top_k") if key in body})
    recipe = None if name is None else scaled(recipes[name], strength)
    with nullcontext() if recipe is None else applied(model, recipe, must_fire=False) as log:
        (done,) = generate(model, [body["messages"]], sampling=sampling)
    return done, [] if log is None else log.table().rows


def told(response):
    """Of an answer, whole or in chunks: thinking, answer, ids, why it ended."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        (choice,) = response.json()["choices"]
        message = choice["message"]
        return message["reasoning_content"] or "", message["content"], choice["token_ids"], choice["finish_reason"]
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    thinking, answer = ("".join(c["delta"].get(key) or "" for c in choices) for key in ("reasoning_content", "content"))
    return thinking, answer, [i for c in choices for i in c["token_ids"]], choices[-1]["finish_reason"]


async def _post_all(url, bodies):
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        return await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))


def test_fifty_at_once_each_get_what_generate_gives_alone(model, recipes, monkeypatch):
    rows, turn, opened = [], _batch.Batch.turn, []
    monkeypatch.setattr(_batch.Batch, "turn", lambda b, new, *, trim: rows.append(len(new)) or turn(b, new, trim=trim))
    begin = _batch.Batch.open
    monkeypatch.setattr(_batch.Batch, "open", lambda batch, new: opened.append(len(new)) or begin(batch, new))
    bodies = [asked(i) for i in range(50)]
    with serving(model, recipes, size=4) as (client, _):
        answers = asyncio.run(_post_all(str(client.base_url), bodies))
        fired = client.get("/thinksteer/fired").json()["recipes"]
    assert sum(opened) + sum(rows) == 50
    assert max(opened) == 4  # they are side by side,
    assert sum(rows) > 0  # and join each other
    touched, ratios = Counter(), Counter()
    for body, answer in zip(bodies, answers, strict=True):
        done, log = alone(model, recipes, body)
        thinking, text, ids, reason = told(answer)
        assert ids == list(done.ids)
        assert (thinking, text) == (done.thinking or "", done.answer)
        assert reason == {"eos": "stop", "length": "length"}[done.stop]
        for step, *_, phase, tokens, ratio, _, _, _ in log:
            touched[steering_of(body)[0], step, phase] += tokens
            ratios[steering_of(body)[0], step, phase] += tokens * ratio
    found = {(name, row["step"], row["phase"]): row for name, own in fired.items() for row in own}
    assert {key: row["tokens"] for key, row in found.items()} == {k: n for k, n in touched.items() if n}
    for key, row in found.items():
        assert row["mean_ratio"] == pytest.approx(ratios[key] / touched[key], rel=1e-4)
    assert len(found) >= 5


def test_who_comes_later_joins_the_batch_that_is_written(model, recipes, endless, monkeypatch):  # noqa: ARG001
    opened, begin = [], _batch.Batch.open
    monkeypatch.setattr(_batch.Batch, "open", lambda batch, new: opened.append(len(new)) or begin(batch, new))
    first, second = asked(9, stream=True), asked(11, max_tokens=5, stream=False)  # one recipe, strength, way to draw
    with serving(model, recipes) as (client, _), client.stream("POST", CHAT, json=first) as stream:
        lines = stream.iter_lines()
        next(lines)
        short = client.post(CHAT, json=second)
        long = [line for line in lines if line]
    ids = [i for line in long[:-1] for i in json.loads(line[6:])["choices"][0]["token_ids"]]
    assert opened == [1]
    assert ids == list(alone(model, recipes, first)[0].ids)
    assert told(short)[2] == list(alone(model, recipes, second)[0].ids)


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_goes_on_from_a_prompt(served, model, stream):
    body = {"prompt": "a 3 b +4 ?", "seed": 5, "return_token_ids": True, "stream": stream}
    answer = served[0].post(TEXT, json=body)
    (done,) = generate(model, ["a 3 b +4 ?"], template="raw", sampling=Sampling.of(model, seed=5, max_new_tokens=SLOW))
    wanted = tokenizer_of(model).decode(done.ids, skip_special_tokens=True)
    if stream:
        choices = [json.loads(x[6:])["choices"][0] for x in answer.text.splitlines() if x and x != "data: [DONE]"]
        assert "".join(c["text"] for c in choices) == wanted
        assert [i for c in choices for i in c["token_ids"]] == list(done.ids)
    else:
        assert answer.json()["choices"][0]["text"] == wanted
        assert answer.json()["choices"][0]["token_ids"] == list(done.ids)


def test_an_answer_says_how_it_can_be_had_again(served, recipes):
    body = {"messages": [{"role": "user", "content": "a 3 b +4 c *7"}], "thinksteer": "both", "return_token_ids": True}
    body["temperature"] = 1.5
    first = served[0].post(CHAT, json=body).json()
    assert first["thinksteer"] == {
        "recipe": "both",
        "strength": 1.0,
        "fingerprint": recipes["both"].fingerprint(),
        "seed": first["thinksteer"]["seed"],
    }
    again = served[0].post(CHAT, json={**body, "seed": first["thinksteer"]["seed"]}).json()
    assert again["choices"] == first["choices"]
    assert len({served[0].post(CHAT, json=body).json()["thinksteer"]["seed"] for _ in range(3)}) == 3
    ids, usage = first["choices"][0]["token_ids"], first["usage"]
    assert usage["total_tokens"] == len(first["prompt_token_ids"]) + len(ids) == usage["prompt_tokens"] + len(ids)
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < len(ids)


def test_what_is_served_is_told(served, recipes):
    client, _ = served
    assert [row["id"] for row in client.get("/v1/models").json()["data"]] == ["organism"]
    listed = {row["name"]: row for row in client.get("/thinksteer/recipes").json()["data"]}
    assert {name: row["fingerprint"] for name, row in listed.items()} == {
        n: r.fingerprint() for n, r in recipes.items()
    }
    assert listed["both"]["steps"][0] == "ablate at L1.resid_post, scope prompt, strength 1"
    assert client.get("/health").json() == {"status": "ok"}


GOOD = {"messages": [{"role": "user", "content": "a 3 b +4"}], "seed": 1}
LONG = " ".join(["+4"] * 130)
WRONG = [
    ({"thinksteer": "slower"}, "There is no recipe 'slower'. Known: thinking, everywhere, both."),
    ({"vllm_xargs": {"thinksteer": 3}}, "thinksteer is 3, and no text."),
    ({"vllm_xargs": {"thinkstear": "both"}}, "vllm_xargs holds thinkstear. Known: thinksteer, thinksteer_strength."),
    ({"vllm_xargs": "both"}, "vllm_xargs is the text 'both', and no object."),
    ({"thinksteer": "both", "vllm_xargs": {"thinksteer": "thinking"}}, "thinksteer is 'both', but 'thinking' in"),
    ({"thinksteer": "both", "thinksteer_strength": "much"}, "thinksteer_strength is the text 'much', and no number."),
    ({"thinksteer": "both", "thinksteer_strength": True}, "thinksteer_strength is true or false, and no number."),
    ({"thinksteer": "both", "thinksteer_strength": 10**400}, "which is no finite number."),
    ({"thinksteer": "both", "thinksteer_strength": 1e40}, "float32"),
    ({"thinksteer_strength": 2.0}, "thinksteer_strength is given, but no recipe"),
    ({"use_beam_search": True}, "Beam search is not done here"),
    ({"n": 2}, "n is 2, but a request gets one answer"),
    ({"stop": ["\n"]}, "stop is not done here"),
    ({"logprobs": True}, "logprobs are not told here."),
    ({"frequency_penalty": 0.5, "guided_json": {}}, "frequency_penalty, guided_json are not known here"),
    ({"temprature": 0}, "temprature is not known here"),
    ({"temperature": -1}, "temperature is -1, but must be at least 0."),
    ({"temperature": "hot"}, "temperature is the text 'hot', and no number."),
    ({"top_p": 0}, "top_p is 0, but must be above it."),
    ({"top_p": 1.5}, "top_p is 1.5, but must be between 0 and 1."),
    ({"top_k": 2.5}, "top_k is 2.5, and no whole number."),
    ({"seed": "x"}, "seed is the text 'x', and no whole number."),
    ({"max_tokens": 0}, "max_tokens is 0, but must be at least 1."),
    ({"max_tokens": 101}, "max_tokens is 101, but 100 fit: the prompt has 6 tokens, the model 128 positions"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens and max_completion_tokens differ."),
    ({"messages": [{"role": "user", "content": LONG}]}, "132 tokens, and the model has 128 positions: at most 127 fit"),
    ({"messages": []}, "messages is a list, but must be a list of at least one message."),
    ({"messages": "a 3"}, "messages is the text 'a 3', but must be a list"),
    ({"messages": [{"role": "user"}]}, "The content of messages[0] is missing, and no text."),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is not all text"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "The chat template reads no chat_template."),
    ({"chat_template_kwargs": {"thinking_mode": "x"}}, "The chat template reads no thinking_mode."),
    ({"stream": "yes"}, "stream is the text 'yes', but must be true or false."),
    ({"stream_options": {"include_usage": True}}, "stream_options is given, but the answer is not streamed."),
    ({"model": "gpt"}, "The model 'gpt' is not served here. Known: organism."),
]
BROKEN = [
    (b"", "The body is not JSON"),
    (b'{"messages": [', "The body is not JSON"),
    (b"\xff\xfe", "The body is not JSON"),
    (b"[1]", "The body is a list, and no JSON object."),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"temperature": NaN}', "NaN is no finite number"),
    (b'{"thinksteer": "both", "thinksteer_strength": 1e999, "messages": []}', "which is no finite number."),
    (b" " * (LARGEST + 1), "The body has more than 4,194,304 bytes"),
]


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [*((json.dumps({**GOOD, **more}).encode(), said) for more, said in WRONG), *BROKEN],
    ids=[said[:40] for _, said in (*WRONG, *BROKEN)],
)
def test_what_is_wrong_is_told_in_a_sentence_and_the_next_is_answered(served, model, raw, sentence):
    client, worker = served
    answer = client.post(CHAT, content=raw)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert sentence in error["message"]
    assert error["message"].endswith(".")
    assert (error["type"], error["code"]) == ("invalid_request_error", 400)
    good = client.post(CHAT, json={**GOOD, "n": 1, "stop": None, "tools": [], "user": "me", "return_token_ids": True})
    assert told(good)[2] == list(alone(model, {}, GOOD)[0].ids)
    assert worker.live == 0


def test_what_goes_wrong_within_is_told_to_those_it_went_wrong_for(served, recipes, model, monkeypatch):
    client, _ = served
    body = {**GOOD, "return_token_ids": True}
    forward = model.forward

    def unwell(*args, **keys):
        out = forward(*args, **keys)
        out.logits[:] = float("nan")
        return out

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", unwell)
        broken = client.post(CHAT, json=body)
        assert broken.status_code == 500
        assert "scores are not numbers (NaN)" in broken.json()["error"]["message"]
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda *_, **__: {}["a fault"])
        fault = client.post(CHAT, json={**body, "stream": True})
        assert "The model failed: KeyError: 'a fault'" in fault.text
        assert fault.text.endswith("data: [DONE]\n\n")
    assert told(client.post(CHAT, json=body))[2] == list(alone(model, recipes, body)[0].ids)


async def _cut(url, bodies):
    """Clients that go away: those who stream after three chunks, the others once the first of these has gone."""
    cut = asyncio.Event()

    async def go(client, body):
        if body["stream"]:
            async with client.stream("POST", CHAT, json=body) as answer:
                chunks = 0
                async for line in answer.aiter_lines():
                    chunks += bool(line)
                    if chunks == 3:
                        cut.set()
                        return
        waiting = asyncio.ensure_future(client.post(CHAT, json=body))
        await asyncio.wait({waiting, asyncio.ensure_future(cut.wait())}, return_when=asyncio.FIRST_COMPLETED)
        assert waiting.cancel()

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(go(client, body) for body in bodies))


def test_twenty_who_go_away_leave_no_row(model, recipes, endless, monkeypatch):  # noqa: ARG001
    tickets, submit = [], batches.Worker.submit
    monkeypatch.setattr(batches.Worker, "submit", lambda worker, t: tickets.append(t) or submit(worker, t))
    bodies = [{**GOOD, "seed": i, "stream": i % 2 == 0, "thinksteer": "thinking"} for i in range(20)]
    with serving(model, recipes, size=20) as (client, worker):
        asyncio.run(_cut(str(client.base_url), bodies))
        began = time.monotonic()
        while (worker.live or len(worker.waiting) or worker._handing) and time.monotonic() - began < 20:
            time.sleep(0.01)
        assert (worker.live, len(worker.waiting), worker._handing) == (0, 0, None)
        assert len(tickets) == 20
        assert all(ticket.count < SLOW for ticket in tickets)
        after = {**GOOD, "return_token_ids": True}
        assert told(client.post(CHAT, json=after))[2] == list(alone(model, recipes, after)[0].ids)


def test_a_key_is_asked_for(model):
    with serving(model, {}, api_key="open sesame") as (client, _):
        for headers in ({}, {"authorization": "Bearer close"}, {"authorization": "open sesame"}):
            answer = client.post(CHAT, json=GOOD, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["message"].startswith("The API key is missing or wrong")
            assert client.get("/thinksteer/recipes", headers=headers).status_code == 401
        key = {"authorization": "Bearer open sesame"}
        assert client.post(CHAT, json=GOOD, headers=key).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_server_that_ends_takes_nobody(model):
    with serving(model, {}) as (client, worker):
        worker.close()
        answer = client.post(CHAT, json=GOOD)
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "The server is shutting down. Ask again when it is up."


def test_a_signal_ends_the_command_within_ten_seconds(model, recipes, tmp_path, monkeypatch):
    """Of twenty who stream one is being answered, and the others wait; each is told in a chunk."""
    monkeypatch.setattr(model.generation_config, "suppress_tokens", [2])
    model.save_pretrained(tmp_path / "endless")
    tokenizer_of(model).save_pretrained(tmp_path / "endless")
    recipes["thinking"].save(tmp_path / "slower")
    command = f"serve {tmp_path / 'endless'} --recipe slower={tmp_path / 'slower'} --port 0 --max-batch 1 --json"
    server = subprocess.Popen([sys.executable, "-m", "steer", *command.split()], stdout=subprocess.PIPE, text=True)
    with ExitStack() as stack:
        stack.callback(server.kill)
        url = next(json.loads(line)["url"] for line in server.stdout if line.startswith("{"))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=30))
        body = {"messages": GOOD["messages"], "thinksteer": "slower", "stream": True}
        streams = [stack.enter_context(client.stream("POST", CHAT, json=body)) for _ in range(20)]
        lines = [stream.iter_lines() for stream in streams]
        assert all("chat.completion.chunk" in next(own) for own in lines)
        began = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        ends = [[line for line in own if line][-2:] for own in lines]
        assert server.wait(10) == 0
        assert time.monotonic() - began < 10
        assert sum("The server is shutting down" in error for error, _ in ends) >= 15
        assert {last for _, last in ends} == {"data: [DONE]"}
        with pytest.raises(httpx.ConnectError):
            client.get("/health")


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["steer", "serve", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0, *capsys.readouterr()


def test_the_command_says_what_it_would_serve(recipes, tmp_path, monkeypatch, capsys):
    recipes["both"].save(tmp_path / "r")
    code, out, err = run(monkeypatch, capsys, "organism", "--recipe", f"both={tmp_path / 'r'}", "--dry-run", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out.splitlines()[-1])
    assert facts["recipes"][0] == {
        "name": "both",
        "steps": [
            "ablate at L1.resid_post, scope prompt, strength 1",
            "add at L2.resid_post, scope thinking, positions 2 to 6, strength 0.7",
        ],
        "fingerprint": recipes["both"].fingerprint(),
    }
    assert (facts["dry_run"], facts["engine"], facts["host"], facts["api_key"]) == (
        True,
        "transformers",
        "127.0.0.1",
        False,
    )


def test_the_command_refuses_in_one_line(recipes, tmp_path, monkeypatch, capsys):
    recipes["both"].save(tmp_path / "r")
    Recipe(recipes["both"].steps, {**recipes["both"].model, "n_layers": 7}).save(tmp_path / "others")
    for words, sentence in (
        ("--recipe r", "--recipe r has no name: give it as NAME=FOLDER."),
        (f"--recipe x={tmp_path}", "holds no recipe.yaml: it is not a recipe."),
        (f"--recipe x={tmp_path / 'r'} --recipe x={tmp_path / 'r'}", "--recipe x is named twice"),
        (f"--recipe x={tmp_path / 'others'}", "This recipe was made for the model 'organism'"),
        ("--engine vroom", "--engine vroom is unknown. Known: transformers, vllm."),
        ("--port 99999", "'--port': it must be at most 65535."),
        ("--host 256.1.1.1 --port 0", "Nobody can listen at 256.1.1.1:0"),
    ):
        code, _, err = run(monkeypatch, capsys, "organism", *words.split())
        assert (code, err.count("\n")) == (2, 1)
        assert sentence in err
    monkeypatch.setattr(launch, "find_spec", {}.get)
    code, _, err = run(monkeypatch, capsys, "organism")
    assert (code, err) == (2, "error: Serving needs fastapi and uvicorn: pip install 'thinksteer[serve]'.\n")


def test_the_example_of_the_page_is_short():
    page = (Path(__file__).parents[2] / "docs/howto/serve.md").read_text()
    blocks = page.split("```")[1::2]
    assert sum(len(block.strip().splitlines()) - 1 for block in blocks[:4]) <= 15
