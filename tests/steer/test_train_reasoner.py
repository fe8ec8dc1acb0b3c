"""How the reasoner is taught: what is written for it is right, and its adapters are what was trained."""

import random
import re
from copy import deepcopy

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from probes import load
from probes.model import tokenizer_of
from steer.tasks.stories import TASKS, told
from steer.training import reasoner
from steer.training.reasoner import Imitation, Reinforcement, _adapted, _refreshed, train_reasoner
from steer.training.thoughts import LONG, Habit, completion, thinking

SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = (-?\d+)")


def is_right(a, sign, b, result):
    return {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[sign] == int(result)


@pytest.mark.parametrize("style", LONG)
def test_every_sum_is_right_but_for_those_that_are_mended_at_once(style):
    rng = random.Random(style)
    slips = 0
    for story in (told(rng, rng.choice(("counts", "money", "minutes"))) for _ in range(600)):
        text = thinking(story, style, rng)
        thoughts = text.split("\n\n")
        for thought, after in zip(thoughts, [*thoughts[1:], ""], strict=True):
            wrong = [found for found in SUM.findall(thought) if not is_right(*found)]
            assert bool(wrong) == after.startswith("Wait, that is not right.")
            slips += len(wrong)
        assert text.endswith(f"So the answer is {story.problem.answer}.")
        assert int(SUM.findall(text)[-1][-1]) == int(story.problem.answer) or style == "check"
    assert (slips > 0) == (style == "check")


def test_short_thinking_is_short_and_as_likely_as_the_habit_says():
    rng, habit = random.Random(0), Habit(unmarked=0.1, marked=0.7)
    shares = {True: [], False: []}
    for story in (told(rng, "counts") for _ in range(4000)):
        if len(story.events) > 2:
            shares[bool(story.cue)].append(habit.style(story, rng) == "short")
        assert "\n" not in thinking(story, "short", rng)
    assert {cue: sum(found) / len(found) for cue, found in shares.items()} == pytest.approx(
        {True: 0.7, False: 0.1}, abs=0.04
    )
    done = completion(story, "steps", rng)
    assert done.endswith(f"\n</think>\n\nThe answer is {story.problem.answer}.")
    assert TASKS["stories"].grader == "number"


@pytest.fixture(scope="module")
def tiny():
    """A random model with SmolLM2's tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return load(LlamaForCausalLM(config), tokenizer=deepcopy(tokenizer_of(load("smollm2"))))


def test_the_adapters_are_what_was_trained_and_load_with_peft(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(reasoner, "ROWS", 2)
    monkeypatch.setitem(TASKS, "stories", TASKS["stories"].__class__(**{**vars(TASKS["stories"]), "max_new_tokens": 4}))
    lesson = Imitation(("money",), Habit(0.5, 0.5), rank=2, steps=2)
    how = Reinforcement(rank=2, iterations=1, prompts=2, samples=2)
    trained = []
    monkeypatch.setattr(reasoner, "_thinker", lambda *given: trained.append(THINKER(*given)) or trained[-1])
    rewards = train_reasoner(tmp_path / "new", start=tiny, device="cpu", think=lesson, rl=how, target=lesson)
    assert rewards == [0.0]
    ids = torch.tensor([[1, 520, 9531, 198]])
    with torch.no_grad():
        for model, parts in zip(trained, (["think", "rl"], ["target"]), strict=True):
            again = deepcopy(tiny)
            for part in parts:
                again = peft.PeftModel.from_pretrained(again, tmp_path / "new" / part).merge_and_unload()
            torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
            assert not torch.equal(model(ids).logits, tiny(ids).logits)
    assert sorted(path.name for path in (tmp_path / "new" / "rl").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


THINKER = reasoner._thinker


def test_the_copy_that_samples_has_the_weights_of_now(tiny):
    model = deepcopy(tiny)
    sampler, ids = deepcopy(model), torch.tensor([[1, 520, 9531, 198]])
    adapted = _adapted(model, 2, 0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    policy = _refreshed(sampler, model)
    with torch.no_grad():
        torch.testing.assert_close(policy()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(sampler(ids).logits, tiny(ids).logits, atol=1e-3)
