"""Models of TransformerLens and nnsight: read at our sites, steered by our recipes, and by their hooks made of them.

It needs both, which `make peers` installs.
"""

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from families import build, build_tokenizer
from remote import ndif

import steer
from probes import Sampling, Site, captured, generate, load
from probes.model import Delimiters, fingerprint, path_of, site_of, tokenizer_of, width_of
from steer import Ablate, Add, Clamp, Controller, Recipe, Rotate, Scale, Schedule, Scope, Step, applied

# It travels by its source, which functions that are checked do not show: so it is loaded as users load it.
SPEC = importlib.util.spec_from_file_location(
    "steer.interop.shipped", Path(steer.__file__).parent / "interop/shipped.py"
)
shipped = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(shipped)

from steer.interop import lens_hooks, trace_edits  # noqa: E402

lens = pytest.importorskip("transformer_lens.model_bridge", reason="transformer-lens is not installed: make peers")
nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed: make peers")
pytestmark = pytest.mark.peers
transformers_model = nnsight.TransformersModel
FAMILIES = ("llama", "qwen3", "gemma2", "qwen3_moe", "gpt2")
NAMES = ("resid_pre", "attn_in", "z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
IDS = torch.tensor([[1, 30, 31, 32, 5, 3, 40, 41, 42, 43, 44, 4, 50, 51]])  # user, words, header, thinking, answer
PROMPT, N_NEW = IDS[:, :9], 12
SHORT = Sampling(max_new_tokens=N_NEW)
THINKING = Delimiters(open=(3,), close=(4,), turn=(5,), user=(1,))


@pytest.fixture(scope="module", params=FAMILIES)
def own(request, tmp_path_factory):
    """A tiny model out of a folder, as no one else has touched it; and the folder."""
    folder = tmp_path_factory.mktemp(request.param)
    model = build(request.param)
    if request.param == "gpt2":
        del model.config.num_key_value_heads  # the tests' common settings, which gpt2 does not know
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return load(folder, dtype=torch.float32, delimiters=THINKING), folder


@pytest.fixture(scope="module")
def bridge(own):
    _, folder = own
    model = load(folder, dtype=torch.float32)
    return lens.TransformerBridge.boot_transformers(str(folder), hf_model=model, tokenizer=tokenizer_of(model))


@pytest.fixture(scope="module")
def traced(own):
    _, folder = own
    model = load(folder, dtype=torch.float32)
    return transformers_model(model, task="text-generation", tokenizer=tokenizer_of(model))


def opened(theirs):
    return load(theirs, delimiters=THINKING)


def read(model):
    with captured(model, [Site(1, name) for name in NAMES]) as found, torch.no_grad():
        logits = model(IDS).logits
    return found, logits


def recipes(model):
    """Every kind, every site and every scope that theirs can have, and some that only `applied` can."""
    made = torch.Generator().manual_seed(3)

    def v(site):
        return torch.randn(width_of(model, site), generator=made)

    def at(kind, name, *rest, head=None, layer=1, **named):
        site = Site(layer, name, head)
        return kind(site, *rest, **named) if kind is Scale else kind(site, v(site), *rest, **named)

    timed = Scope("thinking", schedule=Schedule("linear", start=1.0, end=-0.5, over=4))
    held = Scope("thinking", controller=Controller(set_point=3.0))
    after = Scope("thinking", after=1, markers=((41,), (43,)))
    kinds = [
        (at(Add, "resid_pre", 0.3), "thinking"), (at(Ablate, "attn_in", 0.7), "prompt"),
        (at(Rotate, "z", 0.5), "answer"), (at(Scale, "z", 0.2, head=2), "all"),
        (at(Clamp, "z", low=0.4, head=1), "all"),
        (at(Ablate, "attn_out", target=0.5), timed), (at(Clamp, "resid_mid", high=0.1), "thinking"),
        (at(Add, "mlp_in", 0.4), after), (at(Scale, "mlp_out", -0.5), held), (at(Rotate, "resid_post", 0.8), timed),
        (at(Add, "resid_post", 0.5), Scope("all", tokens=(31, 42, 50))), (at(Ablate, "resid_post"), "answer"),
        (at(Add, "resid_mid", 0.4, layer=0), Scope("thinking", window=(1, 4))), (at(Scale, "resid_pre", 1.2), "all"),
    ]  # fmt: skip
    written = [(at(Scale, "result", -1.0, head=1), "all"), (at(Add, "result", 0.6, head=3, layer=0), "thinking")]
    gauged = Controller(set_point=3.0, site=Site(0, "resid_post"), vector=v(Site(0, "resid_post")) / 9, offset=2.0)
    read_first = [(at(Add, "resid_post", 0.7), Scope("thinking", controller=gauged))]
    identity = Recipe.of(model, []).model
    told = {"kinds": kinds, "written": written, "gauged": read_first}
    return {name: Recipe(tuple(Step(e, Scope.of(s)) for e, s in steps), identity) for name, steps in told.items()}


def logits_of(model, recipe):
    with applied(model, recipe) as log, torch.no_grad():
        logits = model(IDS).logits
    return logits, log.tokens


def far(one, other):
    return float((one - other).detach().abs().max())


@pytest.mark.parametrize("kind", ["bridge", "traced"])
def test_our_sites_on_their_models_give_our_activations(own, kind, request):
    theirs = opened(request.getfixturevalue(kind))
    (ours, logits), (found, told) = read(own[0]), read(theirs)
    assert {str(site): far(ours[site], found[site]) for site in ours if far(ours[site], found[site]) > 1e-5} == {}
    assert far(logits, told) < 1e-5
    assert fingerprint(theirs) == fingerprint(own[0])


def test_the_names_of_hooks_lead_both_ways_and_to_the_same_numbers(own, bridge):
    ours, _ = read(own[0])
    _, cache = bridge.run_with_cache(IDS)
    for site, x in ours.items():
        assert Site.parse(site.transformer_lens) == site
        assert site.transformer_lens in bridge.hook_dict, "it is none of their names"
        assert far(cache[site.transformer_lens].reshape(x.shape), x) < 1e-5, site


def test_every_name_of_theirs_that_is_ours_too_is_read(own, bridge):  # noqa: ARG001
    """Of their own list: those that end in a name that we know by TransformerLens' rules, and no other."""
    canonical = {name.partition(".")[2].partition(".")[2]: name for name in bridge.hook_dict if ".1." in name}
    read_here = {path for path, name in canonical.items() if _parsed(name) is not None}
    assert {"hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"} <= read_here
    assert {"attn.hook_z", "attn.hook_pattern", "attn.hook_in", "mlp.hook_in"} <= read_here
    assert all(_parsed(name).transformer_lens == name for path, name in canonical.items() if path in read_here)


def _parsed(name):
    with contextlib.suppress(ValueError):
        return Site.parse(name)
    return None


def test_the_paths_of_modules_lead_both_ways_in_nnsight(traced):
    model = opened(traced)
    for name in NAMES:
        site = Site(1, name)
        envoy = traced.get(path_of(model, site).removeprefix("."))
        assert envoy._module is model.get_submodule(path_of(model, site))
        if name in ("attn_out", "mlp_out", "resid_post"):
            assert site_of(model, path_of(model, site)) == site


@pytest.mark.parametrize("name", ["kinds", "written", "gauged"])
@pytest.mark.parametrize("kind", ["bridge", "traced"])
def test_a_recipe_applied_to_their_models_gives_our_tokens(own, kind, name, request):
    model, theirs = own[0], opened(request.getfixturevalue(kind))
    recipe = recipes(model)[name]
    (ours, touched), (found, told) = logits_of(model, recipe), logits_of(theirs, recipe)
    assert touched == told > 0
    assert far(ours, found) < 1e-4
    prompts = ["w30 w31 w32", "w40 w41 w33 w34 w35"]  # one is padded
    with applied(model, recipe):
        wanted = [one.ids for one in generate(model, prompts, sampling=SHORT, prefill=[3])]
    with applied(theirs, recipe):
        assert [one.ids for one in generate(theirs, prompts, sampling=SHORT, prefill=[3])] == wanted


def greedy(model, recipe):
    with applied(model, recipe):
        return model.generate(PROMPT, max_new_tokens=N_NEW, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("name", ["kinds", "written", "gauged"])
def test_a_recipe_as_hooks_of_transformer_lens_gives_our_tokens(own, bridge, name):
    model = own[0]
    recipe = recipes(model)[name]
    wanted, touched = logits_of(model, recipe)
    if name == "written" and model.config.model_type == "gemma2":
        with pytest.raises(ValueError, match="behind a norm"):
            lens_hooks(opened(bridge), recipe)
        return
    hooks, log = lens_hooks(opened(bridge), recipe)
    assert {point for point, _ in hooks} <= set(bridge.hook_dict), "by their own names"
    plain = bridge(IDS)
    with torch.no_grad():
        found = bridge.run_with_hooks(IDS, fwd_hooks=hooks)
    assert far(found, wanted) < 1e-4
    assert far(bridge(IDS), plain) == 0.0
    assert log.tokens == touched
    with bridge.hooks(fwd_hooks=hooks):
        written = bridge.generate(PROMPT, max_new_tokens=N_NEW, do_sample=False, stop_at_eos=False, verbose=False)
    assert written.tolist() == greedy(model, recipe).tolist()


@pytest.mark.parametrize("remote", [False, "local"], ids=["here", "serialised"])
@pytest.mark.parametrize("name", ["kinds", "written"])
def test_a_recipe_as_edits_of_a_trace_gives_our_logits(own, traced, name, remote):
    model = own[0]
    recipe = recipes(model)[name]
    edits = trace_edits(traced, recipe, IDS)
    with torch.no_grad(), traced.trace(IDS, remote=remote):
        edits(traced)
        found = traced.output.logits.save()
    assert far(found, logits_of(model, recipe)[0]) < 1e-4


@pytest.mark.parametrize("own", ["llama", "gpt2"], indirect=True)
@pytest.mark.parametrize("name", ["kinds", "written"])
def test_edits_of_a_trace_run_on_a_server_that_knows_nothing_of_us(own, name, tmp_path, monkeypatch):
    """nnsight's own call for NDIF, over HTTP, to a stand-in; the weights are there alone."""
    model, folder = own
    if name == "written":  # what a head writes is a product with its weights
        edits = trace_edits(model, recipes(model)[name], IDS)
    far_off = transformers_model(str(folder), task="text-generation", tokenizer=build_tokenizer())
    assert next(far_off._module.parameters()).is_meta
    monkeypatch.setitem(nnsight.modeling.huggingface._ID_CACHE, str(folder), str(folder))  # else the hub is asked
    with pytest.raises(ValueError, match="The weights of this nnsight model are not here yet"):
        load(far_off)
    if name == "kinds":
        edits = trace_edits(far_off, recipes(model)[name], IDS, delimiters=THINKING)
    with ndif(folder, tmp_path) as address:
        with far_off.trace(IDS, remote=address, blocking=False) as tracer:
            edits(far_off)
            found = far_off.output.logits.save()  # noqa: F841 - it comes back by its name
        saved = tracer.backend()
    assert far(saved["found"], logits_of(model, recipes(model)[name])[0]) < 1e-4


def test_a_generation_of_nnsight_within_applied_gives_our_tokens(own, traced):
    model = own[0]
    recipe = recipes(model)["kinds"]
    with (
        applied(opened(traced), recipe) as log,
        traced.generate(PROMPT, max_new_tokens=N_NEW, do_sample=False, eos_token_id=None) as tracer,
    ):
        written = tracer.result.save()
    assert written.tolist() == greedy(model, recipe).tolist()
    assert log.tokens > 0


def test_what_they_cannot_do_is_refused_by_name(own, traced):
    model = own[0]
    with pytest.raises(
        ValueError, match="reads L0.resid_post as the model runs, and edits of a trace are settled before it"
    ):
        trace_edits(traced, recipes(model)["gauged"], IDS)
