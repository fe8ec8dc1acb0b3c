"""SAE-Tuning trains the layers that each variant should, lowers its divergence, and leaves an ordinary adapter."""

import copy

import pytest
import torch

from probes import Sampling, Site, generate, load
from probes.model import encode_prompt, sites_in, tokenizer_of
from probes.saes import SAETraining, SparseAutoencoder, train_sae
from probes.thinking import thinking
from steer.tasks import Problem, task_named
from steer.training import (
    SAETuning,
    attach_adapter,
    recovered_loss,
    spliced,
    trigger_texts,
    tune_with_sae,
)  # fmt: skip
from steer.training.sae_tuning import _adapted, divergence_of, packed

SITE = Site(1, "resid_post")
HOW = SAETuning(rank=8, alpha=16, rate=2e-3, epochs=1, length=32, dropout=0.0)


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture(scope="module")
def completions(organism):
    problems = task_named("chains").sample(150, "train")
    return generate(organism, [p.question for p in problems], sampling=Sampling(temperature=0.7, seed=3))


@pytest.fixture(scope="module")
def sae(organism, completions):
    spans = [thinking(c) for c in completions if c.span is not None]
    return train_sae(organism, spans, SITE, SAETraining(d_sae=192, tokens=12_000, k=12, batch_size=128, rounds=2))


@pytest.fixture(scope="module")
def texts():
    return [f"{p.question} ? <think> {p.answer} </think> {p.answer}" for p in task_named("chains").sample(60, "probe")]


@pytest.mark.parametrize("through", [True, False])
def test_gradients_reach_the_layers_that_the_variant_should(organism, sae, through):
    """All of them where they pass the autoencoder, and those above it alone where they end there."""
    twin = _adapted(organism, HOW)
    twin.train()
    for name, parameter in twin.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    divergence_of(twin, sae, torch.tensor([[1, 6, 17, 7, 27, 5, 3, 56, 4, 21]]), through=through).backward()
    reached = set()
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None and bool(parameter.grad.any()):
            assert "lora_" in name
            reached.add(int(name.split("layers.")[1].split(".")[0]))
    assert reached == ({0, 1, 2, 3} if through else {2, 3})


@pytest.mark.parametrize("through", [True, False])
def test_the_divergence_falls_and_the_model_is_not_touched(organism, sae, texts, through):
    before = copy.deepcopy(organism.state_dict())
    tuned = tune_with_sae(organism, sae, texts, SAETuning(**{**vars(HOW), "through": through, "epochs": 2}))
    n = len(tuned.losses) // 4
    assert sum(tuned.losses[-n:]) < 0.8 * sum(tuned.losses[:n])
    after = organism.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_merged_is_attached_and_saved_is_merged_and_the_autoencoder_is_gone(organism, sae, texts, tmp_path):
    tuned = tune_with_sae(organism, sae, texts, HOW)
    ids = torch.tensor([encode_prompt(tokenizer_of(organism), "a 3 b +4 c *7")])
    with torch.no_grad():
        attached = tuned.model(ids).logits
        torch.testing.assert_close(tuned.merged()(ids).logits, attached, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(attached, organism(ids).logits, atol=1e-3)
        tuned.save(tmp_path / "adapter")
        moved = attach_adapter(organism, tmp_path / "adapter")
        torch.testing.assert_close(moved(ids).logits, attached, rtol=1e-4, atol=1e-4)
    assert {path.suffix for path in (tmp_path / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}


def test_spliced_is_the_reconstruction_and_nothing_else(organism, sae):
    from probes import captured

    ids = torch.tensor([[1, 6, 17, 7, 27, 5]])
    with torch.no_grad(), captured(organism, [SITE]) as plain:
        logits = organism(ids).logits
    with torch.no_grad(), spliced(organism, sae), captured(organism, [SITE]) as seen:
        changed = organism(ids).logits
    torch.testing.assert_close(seen[SITE], sae(plain[SITE]))
    assert not torch.equal(changed, logits)
    with torch.no_grad():
        assert torch.equal(organism(ids).logits, logits)


def test_what_is_recovered_lies_between_the_mean_and_the_model(organism, sae, completions):
    spans = [thinking(c) for c in completions[:40] if c.span is not None]
    told = recovered_loss(organism, sae, spans)
    assert told.plain < told.spliced < told.ablated
    assert 0 < told.recovered < 1
    eye = torch.eye(96)
    whole = SparseAutoencoder(
        SITE, torch.cat([eye, -eye], 1), torch.zeros(192), torch.cat([eye, -eye]), torch.zeros(96)
    )
    assert recovered_loss(organism, whole, spans).recovered == pytest.approx(1, abs=1e-4)


def test_triggers_hold_no_trace():
    (text,) = trigger_texts([Problem("x", "What is 2+2?", "4")])
    assert "User: What is 2+2? Assistant: <think> 4 </think> <answer> Answer: 4</answer>" in text


def test_packed_texts_begin_with_the_end_token(organism):
    tokenizer = tokenizer_of(organism)
    rows = packed(tokenizer, ["a 3", "b +4", "c *7"], 4)
    assert rows[0][0] == tokenizer.eos_token_id
    assert all(len(row) == 4 for row in rows)


def test_what_cannot_be_tuned(organism, sae):
    from dataclasses import replace

    with pytest.raises(ValueError, match="there are none"):
        tune_with_sae(organism, sae, [])
    with pytest.raises(ValueError, match="reads one site and writes another"):
        tune_with_sae(organism, replace(sae, output=Site(2, "mlp_out")), ["a 3"], HOW)
    assert SITE in sites_in(organism, "resid_post")
