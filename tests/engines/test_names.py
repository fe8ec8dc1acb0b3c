"""What the plugin needs of vLLM is there, by name and parameters: methods that it wraps, hooks of the second runner."""

import importlib
import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("thinksteer_vllm") is None:
    pytest.skip("needs vLLM and its plugin: make vllm", allow_module_level=True)

from thinksteer_vllm.engine import patches
from thinksteer_vllm.engine.attach import FAMILIES
from thinksteer_vllm.engine.runners import check_hooks, second_class
from thinksteer_vllm.refusal import Refused


def test_every_method_that_is_wrapped_is_there_and_is_wrapped_once():
    patches.check_patches()
    patches.install()
    for patch in patches.PATCHES:
        owner = getattr(importlib.import_module(patch.module), patch.owner)
        method = getattr(owner, patch.method)
        patches.install()
        assert method.thinksteer
        assert getattr(owner, patch.method) is method
    patches.check_patches()


def test_a_method_that_is_gone_is_named_at_start(monkeypatch):
    lost = patches.Patch("vllm.v1.engine.input_processor", "InputProcessor", "let_in", (), lambda f: f)
    monkeypatch.setattr(patches, "PATCHES", (lost,))
    with pytest.raises(Refused, match=r"has no vllm.v1.engine.input_processor.InputProcessor.let_in as thinksteer"):
        patches.check_patches()


def test_the_second_runner_has_the_hooks():
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    assert issubclass(second_class(DefaultModelState, None), DefaultModelState)
    with pytest.raises(Refused, match="object has no add_request, remove_request, preprocess_state"):
        check_hooks(object)


def test_every_family_is_one_of_vllm():
    for name in FAMILIES:
        module, _, layer = name.partition(".")
        assert hasattr(importlib.import_module(f"vllm.model_executor.models.{module}"), layer)
