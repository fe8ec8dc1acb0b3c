"""A model behind `steer serve`, by either engine: the command as a process, what it is asked, what it should say."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import cases
import httpx
import torch
from families import TEMPLATE, build_tokenizer

from probes import Site, direction_between, load
from probes.model import decode, delimiters_of, tokenizer_of
from probes.model.tokens import encode_prompt
from steer import Ablate, Add, Clamp, Recipe, Scale, Scope, Step
from steer.engines.vllm.probing import compared, greedy, tolerance_of
from steer.runtime import scaled

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
KEY = "open sesame"


@dataclass(eq=False)
class Model:
    """What is served, the words that it is asked, and how many tokens it is asked for."""

    name: str
    model: object
    recipes: dict
    words: list
    length: int
    long: int  # tokens of an answer that is cut off
    positions: int

    def steered(self, name, strength=1.0):
        return None if name is None else scaled(self.recipes[name], strength)


@dataclass(eq=False)
class Server:
    engine: str
    url: str
    told: dict
    process: subprocess.Popen
    served: Model

    @property
    def client(self):
        return httpx.Client(base_url=self.url, timeout=120, headers={"Authorization": f"Bearer {KEY}"})


def tiny(folder):
    """A random model that thinks, closes its thinking at times, and never ends a turn by itself."""
    model = cases.build("llama", folder / "model")
    with torch.no_grad():
        head, often = model.lm_head.weight, cases.free_close(model)
        head[[0, 1, 2, 3, 5]] = 0.0
        head[4] = head[often] * 1.01
    model.save_pretrained(folder / "model")
    template = TEMPLATE.replace("open_thinking is defined and open_thinking", "true")
    build_tokenizer(template=template).save_pretrained(folder / "model")
    model = load(str(folder / "model"), dtype=torch.float32)
    assert delimiters_of(model).open == (3,)
    noise = torch.randn(4, cases.D_MODEL, generator=torch.Generator().manual_seed(0))
    noise /= noise.norm(dim=1, keepdim=True)
    mixed = (
        Step(Scale(Site(0, "z", head=1), 0.5), Scope("all")),
        Step(Clamp(Site(2, "resid_mid"), noise[1], low=0.5), Scope("prompt")),
        Step(Add(Site(2, "resid_post"), noise[2], 4.0), Scope("answer")),
    )
    made = {
        "thinking": Recipe.of(model, [Add(Site(1, "resid_post"), noise[0], 3.0)], scope="thinking"),
        "without": Recipe.of(model, [Ablate(Site(2, "attn_out"), noise[3], 1.0, target=3.0)], scope="thinking"),
        "mixed": Recipe(mixed, Recipe.of(model, []).model),
    }
    words = [" ".join(f"w{6 + (7 * i + 3 * j) % 90}" for j in range(3 + i % 9)) for i in range(50)]
    return Model(str(folder / "model"), model, _saved(made, folder), words, 32, 200, 256)


def reasoner(folder):
    """The embedded model that thinks in English, in float32."""
    model = load("reasoner", dtype=torch.float32)
    asked = ["Tom has 3 boxes of 4 pens. How many pens has he?", "Add 17 and 26."]
    quick = direction_between(model, [f"{text} Be brief." for text in asked], asked, "L15.resid_post")
    noise = torch.randn(2, 576, generator=torch.Generator().manual_seed(0))
    noise /= noise.norm(dim=1, keepdim=True)
    mixed = (
        Step(Scale(Site(12, "mlp_out"), 0.3), Scope("all")),
        Step(Clamp(Site(20, "resid_post"), noise[0], low=2.0), Scope("answer")),
    )
    made = {
        "thinking": Recipe.of(model, [Add.of(quick, 0.3)], scope="thinking"),
        "without": Recipe.of(model, [Ablate(Site(10, "resid_post"), noise[1], target=20.0)]),
        "mixed": Recipe(mixed, Recipe.of(model, []).model),
    }
    names, things = ("Tom", "Anna", "Ben", "Mia", "Ida"), ("pens", "apples", "coins", "books")
    words = [
        f"{names[i % 5]} has {2 + i % 7} boxes with {3 + i % 8} {things[i % 4]} each, and gives {1 + i % 6} away. "
        f"How many {things[i % 4]} are left?"
        for i in range(50)
    ]
    return Model("reasoner", model, _saved(made, folder), words, 24, 400, 1024)


MODELS = {"tiny": tiny, "reasoner": reasoner}


def _saved(recipes, folder):
    for name, recipe in recipes.items():
        recipe.save(folder / name)
    return recipes


@contextmanager
def serving(engine, served, folder, log):
    """The command in a process of its own, once it says where it listens."""
    command = ["serve", served.name, "--engine", engine, "--port", "0", "--max-batch", "20", "--json"]
    command += [word for name in served.recipes for word in ("--recipe", f"{name}={folder / name}")]
    command += ["--dtype", "float32"]
    if engine == "vllm":
        command += ["--", "--max-model-len", str(served.positions), "--enforce-eager", "--no-async-scheduling"]
    own = {**os.environ, "THINKSTEER_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "steer", *command], stdout=subprocess.PIPE, stderr=err, text=True, env=own
        )
    try:
        line = next((line for line in process.stdout if line.startswith("{")), None)
        assert line is not None, log.read_text()[-4000:]
        told = json.loads(line)
        yield Server(engine, told["url"], told, process, served)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def body_of(served, i, **more):
    """By turns none of the recipes and each of them, at times with a strength, and mostly streamed."""
    name = (None, *served.recipes)[i % (1 + len(served.recipes))]
    steering = {} if name is None else {"thinksteer": name, "thinksteer_strength": 0.5 if i % 3 == 2 else 1.0}
    body = {
        "model": served.name,
        "messages": [{"role": "user", "content": served.words[i]}],
        "temperature": 0,
        "top_p": 1,
        "top_k": 0,
        "max_tokens": served.length,
        "return_token_ids": True,
        "stream": i % 5 != 4,
    }
    return {**body, **({"vllm_xargs": steering} if i % 2 else steering), **more}


def steering_of(body):
    keys = {**body, **body.get("vllm_xargs", {})}
    return keys.get("thinksteer"), keys.get("thinksteer_strength", 1.0)


def ids_of(response):
    """Of an answer, whole or in chunks."""
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        return response.json()["choices"][0]["token_ids"]
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    return [i for chunk in chunks for choice in chunk["choices"] for i in choice.get("token_ids") or []]


def text_of(response):
    """All that is told of thinking and answer, together."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        message = response.json()["choices"][0]["message"]
        return "".join(message.get(key) or "" for key in ("reasoning_content", "content"))
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    deltas = [choice["delta"] for line in lines[:-1] for choice in json.loads(line)["choices"]]
    return "".join(d.get(key) or "" for d in deltas for key in ("reasoning_content", "content"))


async def _post_all(server, bodies):
    headers = {"Authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits, headers=headers) as client:
        return await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))


def at_once(server, bodies):
    return asyncio.run(_post_all(server, bodies))


def expected(served, body):
    name, strength = steering_of(body)
    prompt = encode_prompt(tokenizer_of(served.model), body["messages"])
    return greedy(served.model, prompt, served.steered(name, strength), body["max_tokens"])


def verdicts(served, bodies, answers):
    """How many answers are the run time's, how many but for a tie; and those that are neither."""
    ends = frozenset({tokenizer_of(served.model).eos_token_id})
    count, wrong = Counter(), []
    for i, (body, answer) in enumerate(zip(bodies, answers, strict=True)):
        own, ids = expected(served, body), ids_of(answer)
        place, tie = compared(own, ids, ends, tolerance_of(torch.float32))
        count["equal" if place is None else "tie" if tie else "other"] += 1
        if not tie:
            wrong.append((i, steering_of(body), place, ids, list(own.ids), own.ahead[place]))
    return count, wrong


async def _cut(server, bodies):
    headers = {"Authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=None)

    async def go(client, body):
        async with client.stream("POST", CHAT, json=body) as answer:
            assert answer.status_code == 200
            chunks = 0
            async for line in answer.aiter_lines():
                chunks += bool(line)
                if chunks == 4:
                    return

    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits, headers=headers) as client:
        await asyncio.gather(*(go(client, body) for body in bodies))


def cut_off(server, bodies):
    """Clients that go away after a few chunks."""
    asyncio.run(_cut(server, bodies))


def touched(server):
    with server.client as client:
        told = client.get("/thinksteer/fired").json()["recipes"]
    return {(name, row["step"], row["phase"]): row["tokens"] for name, rows in told.items() for row in rows}


def quiet(server, seconds=10.0):
    """Is nobody's answer written any more, after so many seconds at most? By what is touched, and as vLLM counts."""
    until, before = time.monotonic() + seconds, touched(server)
    while time.monotonic() < until:
        time.sleep(0.5)
        now = touched(server)
        if now == before and running(server) == 0:
            return True
        before = now
    return False


def running(server):
    """As vLLM counts; ours does not tell."""
    if server.engine != "vllm":
        return 0
    with server.client as client:
        lines = client.get("/metrics").text.splitlines()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
    found = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(names)]
    assert len(found) >= 2
    return sum(found)


def words_of(served, ids):
    return decode(tokenizer_of(served.model), ids, special=False)
