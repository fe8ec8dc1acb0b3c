"""The Triton kernel does what the plain form does, in Triton's interpreter: no GPU is needed, and none was there."""

import importlib.util
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None or importlib.util.find_spec("thinksteer_vllm") is None:
    pytest.skip("needs Triton and the plugin for vLLM: make vllm", allow_module_level=True)

import torch
from thinksteer_vllm.edits import edit_stream, edit_whole
from thinksteer_vllm.engine import kernel
from thinksteer_vllm.recipes import Recipe, Scope, Step
from thinksteer_vllm.tables import Tokens, places

WIDTH, N, CPU = 48, 9, torch.device("cpu")


def step(kind, strength, seed=None, **numbers):
    vector = None if seed is None else torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return Step(kind, 0, "resid_post", None, strength, numbers, vector, Scope())


def ready(dtype):
    one = step("add", 2.0, 1), step("ablate", 0.5, 2, target=1.0), step("rotate", 1.0, 3)
    other = step("scale", 0.3), step("clamp", 1.0, 4, low=-0.1, high=0.2)
    recipes = [Recipe(name, steps, {}, "") for name, steps in (("one", one), ("other", other))]
    (place,) = places(recipes, {"stream": WIDTH, "z": WIDTH, "head": 12}, dtype, CPU).values()
    tokens, made = Tokens.of(3, N + 3, CPU), torch.Generator().manual_seed(5)
    tokens.rows[0, :N] = torch.tensor([1, 0, 4, 0, 1, 4, 0, 0, 0])
    tokens.rows[1, :N] = torch.tensor([2, 0, 5, 5, 0, 0, 2, 0, 0])
    tokens.rows[2, :N] = torch.tensor([3, 0, 0, 0, 0, 0, 0, 3, 0])
    tokens.multiples[:, :N] = 2 * torch.rand(3, N, generator=made) - 1
    tokens.strength[:N] = 2 * torch.rand(N, generator=made)
    x, residual = (torch.randn(N, WIDTH, generator=made).to(dtype) for _ in range(2))
    return place, tokens, x, residual


def check(dtype, near):
    place, tokens, x, residual = ready(dtype)
    plain, ours = (x.clone(), residual.clone()), (x.clone(), residual.clone())
    edit_stream(*plain, [place], tokens)
    kernel.edit(*ours, [place], tokens)
    for a, b, before in zip(plain, ours, (x, residual), strict=True):
        assert (a.float() - b.float()).abs().amax() < near
        assert torch.equal(b[[1, 8]], before[[1, 8]])
    plain, ours = x.clone(), x.clone()
    edit_whole(plain, [place], tokens)
    kernel.edit(ours, None, [place], tokens)
    assert (plain.float() - ours.float()).abs().amax() < near
    assert torch.equal(ours[[1, 8]], x[[1, 8]])
    assert not torch.equal(ours, x)


def test_the_kernel_does_what_the_plain_form_does():
    """In a process of its own: the interpreter is chosen when Triton is first imported."""
    own = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    check(torch.float32, 1e-6)
    check(torch.bfloat16, 0.1)
