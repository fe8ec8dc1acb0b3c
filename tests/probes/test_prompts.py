"""What is a list of prompts, how a base model is asked, and models that have no delimiters."""

import pytest
import torch
from families import build, build_tokenizer

from probes import Sampling, Site, direction_between, generate, load
from probes.model import encode_prompt, tokenizer_of
from probes.model.tokens import check_prompts
from steer import Add, Recipe, applied, compare
from steer.decoding import PromptStyle

S = Sampling(max_new_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def base():
    """A model as it comes from pre-training: no chat template, no delimiters."""
    words = ("<pad>", "<bos>", "<eos>")
    tokenizer = build_tokenizer(words, None)
    tokenizer.chat_template = None
    return load(build("llama"), tokenizer=tokenizer)


@pytest.mark.parametrize("prompts", ["w8 w9", b"w8", [{"role": "user", "content": "w8"}]])
def test_one_prompt_is_no_list_of_prompts(prompts):
    with pytest.raises(ValueError, match=r"One (prompt|conversation) was given as such"):
        check_prompts(prompts)


@pytest.mark.parametrize("words", [{"samples": 0}, {"batch_size": 0}, {"samples": -5}])
def test_less_than_one_is_refused(words):
    with pytest.raises(ValueError, match=f"{next(iter(words))} is -?[05], but at least 1 is needed"):
        generate(build("llama"), ["w8"], sampling=S, **words)


def test_a_base_model_continues_a_text(base):
    with pytest.raises(ValueError, match="give template='raw' for a base model"):
        generate(base, ["w8 w9"], sampling=S)
    (done,) = generate(base, ["w8 w9"], sampling=S, template="raw")
    ids = tokenizer_of(base).encode("w8 w9")
    assert list(done.prompt_ids) == ids
    out = base.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
    assert list(done.ids) == out
    assert done.thinking is None
    assert done.span is None


def test_a_conversation_cannot_be_written_raw(base):
    with pytest.raises(ValueError, match="cannot be written raw"):
        encode_prompt(tokenizer_of(base), [{"role": "user", "content": "w8"}], template="raw")


def test_without_delimiters_a_recipe_at_all_tokens_is_compared_and_one_in_the_thinking_is_refused():
    model = load("smollm2")
    direction = direction_between(model, ["Yes, certainly so."], ["No, never at all."], Site(10, "resid_post"))
    recipe = Recipe.of(model, [Add.of(direction, 0.1)])
    with applied(model, recipe) as log:
        (done,) = generate(model, ["What is 3 + 4?"], sampling=S)
    assert log.tokens > 0
    assert done.thinking is None
    assert done.answer
    result = compare(model, recipe, ["What is 3 + 4?"], sampling=S)
    assert result.steered[0].answer == done.answer
    assert compare(model, recipe, ["What is 3 + 4?"], sampling=S).fired.tokens > 0
    inside = Recipe.of(model, [Add.of(direction, 0.1)], scope="thinking")
    with pytest.raises(ValueError, match="has thinking delimiters"), applied(model, inside):
        pass


def test_a_style_may_be_raw(base):
    assert PromptStyle(template="raw").prefill(base) == ()
