"""What a model's generation config says of its tokens is honoured, or named; and what no token can be drawn from."""

import json
from collections import Counter

import pytest
import torch
from families import BASE, build, build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from probes import Sampling, Site, attached, direction_between, generate, load
from probes.generation import read_completions, write_completions

S = Sampling(max_new_tokens=6, temperature=0)


def with_settings(**words):
    model = build("llama")
    model.generation_config = GenerationConfig(
        eos_token_id=2, pad_token_id=0, bos_token_id=1, do_sample=True, temperature=1.0, **words
    )
    return model


def test_min_p_is_the_models_own():
    model = with_settings(min_p=0.8)
    sampling = Sampling.of(model, max_new_tokens=1)
    assert sampling.min_p == pytest.approx(0.8)
    done = generate(model, ["w8 w9"], sampling=sampling, samples=200)
    with torch.no_grad():
        chances = model(torch.tensor([done[0].prompt_ids])).logits[0, -1].softmax(-1)
    allowed = set((chances >= 0.8 * chances.max()).nonzero().flatten().tolist())
    drawn = Counter(c.ids[0] for c in done)
    assert set(drawn) <= allowed
    free = generate(model, ["w8 w9"], sampling=Sampling.of(build("llama"), max_new_tokens=1), samples=200)
    assert {c.ids[0] for c in free} - allowed


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"typical_p": 0.2, "epsilon_cutoff": 0.1}, "typical_p=0.2, epsilon_cutoff=0.1"),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6"),
        ({"num_return_sequences": 3}, "num_return_sequences=3"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"stop_strings": ["w9"]}, "stop_strings="),
    ],
)
def test_what_is_left_out_is_named_and_changes_no_token(words, named):
    model = with_settings(**words)
    with pytest.warns(UserWarning, match=f"sets {named}.*, which is left out"):
        (done,) = generate(model, ["w8 w9"], sampling=S)
    assert done.ids == generate(with_settings(), ["w8 w9"], sampling=S)[0].ids
    assert getattr(model.generation_config, next(iter(words))) == next(iter(words.values()))


@pytest.mark.parametrize("words", [{"suppress_tokens": [50, 51]}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 6}])
def test_what_changes_scores_is_honoured_and_told_apart_in_a_store(words, tmp_path):
    model, plain = with_settings(**words), with_settings()
    (done,) = generate(model, ["w8 w9"], sampling=S)
    out = model.generate(torch.tensor([done.prompt_ids]), max_new_tokens=6, do_sample=False)[0, len(done.prompt_ids) :]
    assert list(done.ids) == out.tolist()
    generate(plain, ["w8 w9"], sampling=S, store=tmp_path / "s.jsonl")
    with pytest.raises(ValueError, match="by other weights, or under another recipe"):
        generate(model, ["w8 w9"], sampling=S, store=tmp_path / "s.jsonl")


def test_scores_that_are_not_numbers_are_refused():
    model = build("llama")
    with (
        attached(model, Site(1, "resid_post"), lambda x: x * float("nan")),
        pytest.raises(ValueError, match="scores for the prompt 'p0' are not numbers .NaN., so no token can be drawn"),
    ):
        generate(model, ["w8", "w9"], ids=["p0", "p1"], sampling=S)


def test_a_prompt_beyond_the_models_positions_is_refused():
    config = AutoConfig.for_model("gpt2", **BASE)
    model = load(AutoModelForCausalLM.from_config(config), tokenizer=build_tokenizer())
    long = " ".join(["w8"] * 125)
    with pytest.raises(ValueError, match=r"positions for 128 tokens, .* a row of 127 tokens and up to 6 new ones came"):
        generate(model, [long], sampling=S)
    assert len(generate(model, [long], sampling=Sampling(max_new_tokens=1, temperature=0))[0].ids) == 1
    with pytest.raises(ValueError, match="positions for 128 tokens, and no more, but a row of 1[34]. tokens came"):
        direction_between(model, [long + " w9" * 10], ["w8 w9"], Site(1, "resid_post"))


def test_rows_of_before_there_was_min_p_are_read(tmp_path):
    (done,) = generate(build("llama"), ["w8"], sampling=S)
    write_completions(tmp_path / "c.jsonl", [done])
    row = json.loads((tmp_path / "c.jsonl").read_text())
    del row["sampling"]["min_p"]
    (tmp_path / "old.jsonl").write_text(json.dumps(row) + "\n")
    assert read_completions(tmp_path / "old.jsonl") == [done]
