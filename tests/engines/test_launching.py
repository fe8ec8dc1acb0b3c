"""How `steer serve --engine vllm` starts its server, watches over it, and tells whether it steers. Without vLLM."""

import asyncio
import json
import os
import re
import signal
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace as Named

import fake
import plugin  # noqa: F401 - the plugin's package becomes importable
import pytest
import torch
from thinksteer_vllm.engine import addresses, admission

from probes import Site, load
from probes.model import delimiters_of, tokenizer_of
from probes.model.delimiters import thinking_span
from steer import Add, Recipe, Scale
from steer.engines.serving import Address, Service
from steer.engines.vllm import check_options, child, command, plan_of, probing, serve_vllm, serving, serving_settings
from steer.engines.vllm.probing import Client, Expected, Written, compared, probed


@pytest.fixture(scope="module")
def model():
    return load("organism")


@pytest.fixture(scope="module")
def recipes(model):
    noise = torch.randn(96, generator=torch.Generator().manual_seed(0))
    return {
        "thinking": Recipe.of(model, [Add(Site(2, "resid_post"), noise, 2.0)], scope="thinking"),
        "half": Recipe.of(model, [Scale(Site(1, "mlp_out"), 0.5)]),
    }


@pytest.fixture(scope="module")
def folders(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    for name, recipe in recipes.items():
        recipe.save(folder / name)
    return {name: folder / name for name in recipes}


@pytest.fixture(scope="module")
def expected(model, recipes):
    return Expected.of(model, recipes, 2)


# What is asked of vLLM


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "9"], "--port is not for vLLM's options: give --port before the --."),
        (["--additional_config.thinksteer", "x"], "--additional_config.thinksteer is not for vLLM's options"),
        (["--api-key=secret"], "--api-key is not for vLLM's options: give --api-key before the --"),
        (["4096"], "'4096' is no option of vLLM"),
    ],
)
def test_options_that_are_ours_are_refused_and_no_value_is_repeated(options, sentence):
    check_options(["--max-model-len", "4096", "-tp", "2"])
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        check_options(options)
    assert "secret" not in str(error.value)


def test_the_dtype_is_found_among_vllm_s_options():
    assert command.dtype_of(["--max-model-len", "9"]) is None
    assert command.dtype_of([]) is None
    assert command.dtype_of(["--dtype", "half"]) == "float16"
    assert command.dtype_of(["--dtype=bfloat16", "--seed", "1"]) == "bfloat16"


def test_the_key_goes_by_the_environment_and_the_user_s_plugins_stay(tmp_path):
    own = command.environment_of("secret", {"VLLM_PLUGINS": "mine, other", "HOME": "/h"})
    assert own == {"HOME": "/h", "VLLM_API_KEY": "secret", "VLLM_PLUGINS": "mine,other,thinksteer"}
    assert command.environment_of(None, {"VLLM_PLUGINS": "thinksteer"}) == {"VLLM_PLUGINS": "thinksteer"}
    assert command.environment_of(None, {"VLLM_PLUGINS": ""})["VLLM_PLUGINS"] == "thinksteer"
    assert "thinksteer" in command.environment_of(None, {})["VLLM_PLUGINS"].split(",")
    path = command.settings_file(
        tmp_path / "v.yaml", source="s", name="n", host="h", port=9, dtype="float32", settings={"a": 1}, max_batch=3
    )
    words = json.loads(path.read_text())
    assert json.loads(words.pop("additional-config")) == {"a": 1}
    assert words == {"model": "s", "served-model-name": "n", "host": "h", "port": 9, "dtype": "float32", "max-num-seqs": 3}  # fmt: skip  # noqa: E501
    argv = command.command_of(path, ["--seed", "1"])
    assert argv[1:] == ["-m", "vllm.entrypoints.openai.api_server", "--config", str(path), "--seed", "1"]


def test_plugins_that_vllm_would_have_loaded_are_named(monkeypatch):
    groups = {"vllm.general_plugins": ["thinksteer", "lora"], "vllm.platform_plugins": ["npu"]}
    monkeypatch.setattr(
        command.importlib.metadata, "entry_points", lambda group: [Named(name=name) for name in groups.get(group, ())]
    )
    assert command.environment_of(None, {})["VLLM_PLUGINS"] == "thinksteer,lora,npu"


@pytest.mark.parametrize(
    ("specs", "entries", "lost"),
    [
        ({}, (), "vllm and thinksteer-vllm"),
        ({"vllm": 1}, ("thinksteer",), "thinksteer-vllm"),
        ({"vllm": 1, "thinksteer_vllm": 1}, (), "thinksteer-vllm"),  # one without addresses
        ({"thinksteer_vllm": 1}, ("thinksteer",), "vllm"),
    ],
)
def test_what_is_not_installed_is_named(specs, entries, lost, monkeypatch):
    monkeypatch.setattr(command, "find_spec", specs.get)
    monkeypatch.setattr(command.importlib.metadata, "entry_points", lambda group: Named(names=set(entries)))  # noqa: ARG005
    with pytest.raises(ImportError, match=f"^--engine vllm needs {lost}: pip install vllm.* take --engine transform"):
        command.check_vllm()
    monkeypatch.setattr(command, "find_spec", {"vllm": 1, "thinksteer_vllm": 1}.get)
    monkeypatch.setattr(command.importlib.metadata, "entry_points", lambda group: Named(names={"thinksteer"}))  # noqa: ARG005
    command.check_vllm()


# The plan


def test_a_plan_holds_no_weights_and_what_the_service_would_tell(model, recipes, folders):
    asked, living = [], []

    def loading(dtype):
        own = load("organism")
        asked.append(dtype)
        living.append(weakref.ref(own))
        return own

    plan = plan_of("organism", folders, loading, options=("--dtype", "float32"), n_probes=1)
    service = Service("organism", model, recipes)
    assert asked == ["float32"]
    assert living[0]() is None
    assert (plan.dtype, plan.facts) == ("float32", service.facts)
    assert plan.table().rows == service.table().rows
    own = plan.settings["thinksteer"]
    assert own["facts"] == plan.facts
    assert own["steps"]["thinking"] == [["add", "L2.resid_post", "thinking"]]
    assert own["delimiters"]["open"] == [3]
    assert Path(plan.source, "config.json").is_file()


def test_without_probes_no_weights_are_read(folders):
    plan = plan_of("organism", folders, lambda dtype: pytest.fail(f"{dtype} was loaded"), n_probes=0)
    with_probes = plan_of("organism", folders, lambda dtype: load("organism", dtype=dtype), n_probes=1)
    assert plan.expected is None
    assert (plan.dtype, plan.settings) == (with_probes.dtype, with_probes.settings)


def test_recipes_of_another_model_and_too_many_probes_are_refused(recipes, tmp_path):
    Recipe(recipes["half"].steps, {**recipes["half"].model, "n_layers": 7}).save(tmp_path / "others")
    with pytest.raises(ValueError, match="This recipe was made for the model 'organism'"):
        plan_of("organism", {"x": tmp_path / "others"}, lambda dtype: load("organism", dtype=dtype))
    with pytest.raises(ValueError, match="There are 8 prompts to probe with, but 9 are asked for"):
        plan_of("organism", {}, lambda dtype: load("organism", dtype=dtype), n_probes=9)


# The probe


def test_prompts_are_in_the_thinking_and_behind_it(model):
    first, second = probing.prompts_of(model, 2)
    d = delimiters_of(model)
    assert not thinking_span(first, (), d).closed
    assert thinking_span(second, (), d) is None  # it is over
    assert second[-1] == d.close[0]
    assert tokenizer_of(model).unk_token_id not in (*first, *second)


def test_the_run_time_is_what_generate_writes(model, recipes, expected):
    from steer import applied

    for name, rows in expected.written.items():
        for ids, row in zip(expected.prompts, rows, strict=True):
            given, own = torch.tensor([ids]), {"do_sample": False, "max_new_tokens": len(row.ids), "eos_token_id": None}
            if name is None:
                out = model.generate(given, **own)
            else:
                with applied(model, recipes[name], must_fire=False) as log:
                    out = model.generate(given, **own)
                assert log.tokens == row.touched
            assert out[0, len(ids) :].tolist() == list(row.ids)
            assert min(row.ahead) >= 0
    assert all(sum(row.touched for row in expected.written[name]) > 0 for name in recipes)


def test_where_ids_first_differ_and_whether_it_is_a_tie():
    own = Written((5, 6, 2, 8), (1.0, 1e-4, 1.0, 1.0))
    ends = frozenset({2})
    assert compared(own, [5, 6, 2, 9], ends, 1e-3) == (None, True)  # behind the end
    assert compared(own, [5, 7, 2, 8], ends, 1e-3) == (1, True)
    assert compared(own, [5, 7, 2, 8], ends, 1e-5) == (1, False)
    assert compared(own, [4, 6, 2, 8], ends, 1e-3) == (0, False)
    assert compared(own, [5], ends, 1e-3) == (1, False)  # it is missing, which no tie explains
    assert (
        probing.tolerance_of(torch.float32) < probing.tolerance_of(torch.float16) < probing.tolerance_of(torch.bfloat16)
    )


@contextmanager
def faking(table, **more):
    server = ThreadingHTTPServer(("127.0.0.1", 0), fake.handler(table, **more))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_that_steers_passes(expected):
    with faking(fake.table_of(expected), key="k") as url:
        rows = probed(Client(url, "organism", "k"), expected).rows
        assert rows == (("none", 2, 0, 0), ("thinking", 2, 0, 2), ("half", 2, 0, 2))
        with pytest.raises(ValueError, match="answered /v1/completions of the probe with 401"):
            probed(Client(url, "organism", "wrong"), expected)
    with pytest.raises(ValueError, match="did not answer /v1/completions of the probe"):
        probed(Client(url, "organism", "k"), expected)


def test_a_server_that_does_not_steer_is_found_out(expected):
    table = fake.table_of(expected)
    unsteered = {name: table[""] for name in table}
    with (
        faking(unsteered) as url,
        pytest.raises(ValueError, match="vLLM does not write what the run time writes under"),
    ):
        probed(Client(url, "organism"), expected)
    with faking(table, counts=False) as url, pytest.raises(ValueError, match="counts no token that the recipe 'think"):
        probed(Client(url, "organism"), expected)
    wide = replace(expected, tolerance=1e9)  # every difference is a tie: but it writes as without
    with faking(unsteered) as url, pytest.raises(ValueError, match="writes the same with the recipe 'thinking' as"):
        probed(Client(url, "organism"), wide)


def test_one_wrong_token_is_named_and_a_tie_is_counted(expected):
    table = fake.table_of(expected)
    prompt = next(iter(table["thinking"]))
    table["thinking"][prompt] = [table["thinking"][prompt][0], 77, *table["thinking"][prompt][2:]]
    first = expected.written["thinking"][0]
    with faking(table) as url:
        with pytest.raises(ValueError, match=rf"token 1 of its answer to probe 0 is 77, but {first.ids[1]} here"):
            probed(Client(url, "organism"), expected)
        near = replace(first, ahead=(first.ahead[0], 5e-4, *first.ahead[2:]))
        tied = replace(expected, written={**expected.written, "thinking": (near, expected.written["thinking"][1])})
        assert probed(Client(url, "organism"), tied).rows[1] == ("thinking", 1, 1, 2)


# The child


def python(code, *, tell=None):
    return child.Child([sys.executable, "-c", code], os.environ, tell or (lambda _: None))


def test_a_child_that_dies_is_told_with_what_it_said():
    told = []
    own = python(
        "import sys; print('(EngineCore pid=7) ERROR 11-28 08:00:00 [core.py:9] thinksteer_vllm.refusal.Refused: It is "
        "this: do that.'); sys.exit('RuntimeError: Engine core initialization failed. See root cause above.')",
        tell=told.append,
    )
    with pytest.raises(
        ValueError, match=r"^vLLM ended before it was ready, with exit status 1: It is this: do that\.$"
    ):
        child.wait_for(lambda: False, own, every=0.01)
    assert len(told) == 2
    own.end()


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "it said nothing."),
        (["pydantic.ValidationError: 1", "  Value error, Too long: take 9. [type=value_error, i"], "Too long: take 9."),
        (["one", "", "two"], "its last lines are: one / two"),
        (["usage: x", "api_server.py: error: argument --dtype: invalid choice"], "argument --dtype: invalid choice"),
        (["(A pid=1) ValueError: too long", "  at 3", "RuntimeError: Engine core initialization failed."], "too long."),
    ],
)  # fmt: skip
def test_the_reason_is_the_last_error_that_says_something(lines, reason):
    assert reason in child.reason_of(lines)


def test_a_child_that_takes_no_notice_is_ended_with_what_it_started(monkeypatch):
    monkeypatch.setattr(child, "_GENTLY", 0.3)
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(inner.pid, flush=True); time.sleep(60)"
    )
    own = python(code)
    while not own.lines:
        time.sleep(0.01)
    inner = int(own.lines[0])
    own.end()
    assert not own.alive
    gone = time.monotonic() + 5
    while time.monotonic() < gone and _lives(inner):
        time.sleep(0.01)
    assert not _lives(inner)


def _lives(pid):
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a child that its parent has died")
def test_no_child_is_left_where_we_are_killed():
    import subprocess

    code = (
        "import os, sys; from steer.engines.vllm import child\n"
        "own = child.Child([sys.executable, '-c', 'import time; time.sleep(60)'], os.environ)\n"
        "print(own.process.pid, flush=True); import time; time.sleep(60)"
    )
    ours = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(ours.stdout.readline())
    assert _lives(pid)
    ours.kill()
    ours.wait()
    gone = time.monotonic() + 5
    while time.monotonic() < gone and _lives(pid):
        time.sleep(0.01)
    assert not _lives(pid)


# All of it, over a server that is not vLLM's


@pytest.fixture
def planned(folders, tmp_path, monkeypatch):
    """A plan whose server is the fake one."""
    plan = plan_of("organism", folders, lambda dtype: load("organism", dtype=dtype))
    (tmp_path / "fake.json").write_text(json.dumps(fake.table_of(plan.expected)))
    monkeypatch.setattr(serving, "check_vllm", lambda: None)
    script = str(Path(fake.__file__))
    monkeypatch.setattr(serving, "command_of", lambda config, _: [sys.executable, script, "--config", str(config)])
    return replace(plan, source=str(tmp_path / "model"))


def test_it_is_ready_once_it_was_seen_to_steer_and_a_signal_ends_it(planned, capfd):
    told = []

    def ready(url, probe):
        told.append((url, probe))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    began = time.monotonic()
    serve_vllm(planned, Address(port=0), ready=ready)
    assert time.monotonic() - began < 30
    ((url, probe),) = told
    assert [row[0] for row in probe.rows] == ["none", "thinking", "half"]
    assert not Client(url, "organism").healthy()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "a fake begins" in capfd.readouterr().err


def test_it_is_never_ready_where_it_does_not_steer(planned):
    path = Path(planned.source).with_name("fake.json")
    table = json.loads(path.read_text())
    path.write_text(json.dumps({name: table[""] for name in table}))
    with pytest.raises(ValueError, match="vLLM does not write what the run time writes under the recipe 'thinking'"):
        serve_vllm(planned, Address(port=0), ready=lambda *_: pytest.fail("it was said to be ready"))
    serve_vllm(replace(planned, expected=None), Address(port=0), ready=lambda *_: os.kill(os.getpid(), signal.SIGINT))


def test_an_engine_that_dies_under_the_probe_says_why(planned):
    Path(planned.source).with_name("fake.json").write_text("{}")
    with pytest.raises(ValueError, match="ended while it was probed, with exit status 1: This head_dim is not done."):
        serve_vllm(planned, Address(port=0))


def test_it_says_why_it_ended(planned):
    Path(planned.source).with_name("fake.json").unlink()
    with pytest.raises(ValueError, match=r"vLLM ended before it was ready, with exit status 1: .*No such file"):
        serve_vllm(planned, Address(port=0))


# The plugin's side


class Bad(Exception):
    """In place of vLLM's."""


def test_keys_that_stand_beside_the_others_are_read(monkeypatch):
    monkeypatch.setattr(admission, "refusal", Bad)
    monkeypatch.setattr(admission, "_SERVED", {})
    seen = admission.gathering(lambda own, max_tokens: (own.vllm_xargs, max_tokens))
    beside = {"thinksteer": "a", "thinksteer_strength": 2.0, "other": 1}
    assert seen(Named(vllm_xargs=None, model_extra=beside), 5) == ({"thinksteer": "a", "thinksteer_strength": 2.0}, 5)
    assert seen(Named(vllm_xargs={"x": 1}, model_extra={"thinksteer": "a"}), 5)[0] == {"x": 1, "thinksteer": "a"}
    assert seen(Named(vllm_xargs=None, model_extra=None), 5)[0] is None
    with pytest.raises(Bad, match="thinksteer is 'a', but 'b' in vllm_xargs"):
        seen(Named(vllm_xargs={"thinksteer": "b"}, model_extra={"thinksteer": "a"}), 5)
    with pytest.raises(Bad, match="cannot follow beam search"):
        admission.without_beams(lambda *_: None)(Named(vllm_xargs=None, model_extra={"thinksteer": "a"}), 5)


def test_a_wish_is_refused_before_a_stream_begins(folders, model, monkeypatch):
    monkeypatch.setattr(admission, "refusal", Bad)
    monkeypatch.setattr(admission, "_SERVED", {})
    admission.noting(lambda *_: None)(Named(), Named(additional_config=serving_settings(folders, delimiters_of(model))))
    seen = admission.gathering(lambda own, max_tokens: own.vllm_xargs)  # noqa: ARG005
    assert seen(Named(vllm_xargs={"thinksteer": "half"}, model_extra={}), 5) == {"thinksteer": "half"}
    for wrong, sentence in (
        ({"thinksteer": "nobody"}, "There is no recipe 'nobody'"),
        ({"thinksteer": "half", "thinksteer_strength": 1e40}, "is 1e\\+40: times the strengths of 'half' it is beyond"),
    ):
        with pytest.raises(Bad, match=sentence):
            seen(Named(vllm_xargs=wrong, model_extra={}), 5)


def told_by(settings, log=(), *, keys=(), authorization=None):
    """What the plugin's two addresses say."""

    async def rpc(name):
        assert name == "thinksteer_log"
        return [list(log), list(log)]

    own = addresses.Addresses()
    own.engine, own.keys = Named(vllm_config=Named(additional_config=settings), collective_rpc=rpc), list(keys)
    return own.recipes(authorization), asyncio.run(own.fired(authorization))


def test_the_addresses_tell_what_our_own_server_tells(folders, model, recipes):
    settings = serving_settings(folders, delimiters_of(model))
    row = {"recipe": "thinking", "step": 0, "what": "", "phase": "thinking", "tokens": 5}
    (status, listed), (_, fired) = told_by(settings, [row])
    assert (status, listed["data"]) == (200, Service("organism", model, recipes).facts)
    assert fired["recipes"]["half"] == []
    assert fired["recipes"]["thinking"] == [
        {"step": 0, "site": "L2.resid_post", "kind": "add", "scope": "thinking", "phase": "thinking", "tokens": 5,
         "mean_ratio": None}
    ]  # fmt: skip
    assert told_by({}) == ((200, {"object": "list", "data": []}), (200, {"recipes": {}}))


def test_the_addresses_ask_for_the_key_and_for_whole_settings(folders, model):
    settings = serving_settings(folders, delimiters_of(model))
    for authorization in (None, "Bearer", "Bearer b", "a"):
        for status, fields in told_by(settings, keys=["a"], authorization=authorization):
            assert status == 401
            assert fields["error"]["message"].startswith("The API key is missing or wrong")
    assert all(status == 200 for status, _ in told_by(settings, keys=["b", "a"], authorization="Bearer a"))
    bare = {"thinksteer": {key: own for key, own in settings["thinksteer"].items() if key != "facts"}}
    for status, fields in told_by(bare):
        assert status == 501
        assert "write them with steer.engines.vllm.serving_settings." in fields["error"]["message"]
