"""A hook is heard in every pass, on the model it was put on, by one thread; else a sentence says why not."""

import copy
from threading import Event, Thread

import pytest
import torch
from families import build

from probes import Sampling, Site, attached, captured, generate
from steer import Ablate, Recipe, applied, folded

IDS = torch.tensor([[1, 9, 5, 3, 20, 21]])


def _recipe(model, **words):
    return Recipe.of(model, [Ablate(Site(1, "result", 2), torch.ones(32), strength=5.0)], **words)


def _compiled(way):
    model = build("llama")
    if way == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif way == "model":
        model.compile(backend="eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    with torch.no_grad():
        model(IDS)
    return model


@pytest.mark.parametrize("way", ["forward", "model", "layers"])
def test_a_compiled_model_that_has_run_is_steered_as_a_plain_one(way):
    model, plain = _compiled(way), build("llama")
    with torch.no_grad():
        with applied(plain, _recipe(plain)):
            wanted = plain(IDS).logits
        with applied(model, _recipe(model)) as log, captured(model, [Site(1, "resid_post")]) as cache:
            steered = model(IDS).logits
        assert torch.equal(steered, wanted)
        assert log.tokens == IDS.numel()
        assert cache
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_what_stands_in_for_a_hooked_module_is_named():
    model = build("llama")
    block = model.model.layers[1]
    model.model.layers[1].mlp.forward = lambda x: x  # still called as a module: heard
    with captured(model, [Site(1, "mlp_out")]) as cache, torch.no_grad():
        model(IDS)
    assert cache
    block.forward = lambda hidden_states, **_: hidden_states  # its attention is never called
    edited = attached(model, Site(1, "attn_out"), lambda x: x + 1)
    with pytest.raises(ValueError, match=r"not through the hook at L1\.attn_out"), torch.no_grad(), edited:
        model(IDS)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: folded(model, _recipe(model, scope="all"))])
def test_a_copy_made_inside_is_not_steered_for_ever(make):
    model = build("llama")
    if make is not copy.deepcopy:
        outside = make(model)
    with torch.no_grad():
        plain = model(IDS).logits if make is copy.deepcopy else outside(IDS).logits
        with applied(model, _recipe(model)):
            steered = model(IDS).logits
            within = make(model)
            assert torch.equal(within(IDS).logits, plain)
            assert torch.equal(model(IDS).logits, steered)
        assert torch.equal(within(IDS).logits, plain)
        with applied(within, _recipe(within)):  # and it can be steered itself
            assert not torch.equal(within(IDS).logits, plain)


def test_a_second_thread_on_a_steered_model_is_refused():
    model, went, done, said = build("llama"), Event(), Event(), []

    def other():
        went.wait(10)
        try:
            with torch.no_grad():
                model(IDS)
        except ValueError as error:
            said.append(str(error))
        done.set()

    thread = Thread(target=other, name="second")
    thread.start()
    with applied(model, _recipe(model)), torch.no_grad():
        model(IDS)
        went.set()
        done.wait(10)
        model(IDS)
    thread.join()
    assert "'second' runs a model" in said[0]


def test_a_worker_may_run_what_its_starter_steers():
    model, made = build("llama"), []
    sampling = Sampling(max_new_tokens=4, temperature=0)
    with applied(model, _recipe(model)) as log:
        for _ in range(2):
            thread = Thread(target=lambda: made.extend(generate(model, ["w8"], sampling=sampling)))
            thread.start()
            thread.join()
    assert len(made) == 2
    assert log.tokens


def test_gradient_checkpointing_is_refused_under_an_edit():
    model = build("llama").train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpointing_disable"), applied(model, _recipe(model)):
        model(IDS, labels=IDS, use_cache=False)
    with captured(model, [Site(1, "resid_post")]) as cache:  # reading changes nothing
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert cache


def test_leaving_early_is_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="leave early"), applied(model, _recipe(model)):
        model.generate(IDS, assistant_early_exit=1, max_new_tokens=4, do_sample=False)


def test_hooks_closed_in_any_order_leave_nothing_behind():
    model = build("llama")
    first, second = (attached(model, Site(n, "resid_post"), lambda x: x + 1) for n in (0, 1))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with torch.no_grad():
        model(IDS)
    second.__exit__(None, None, None)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
