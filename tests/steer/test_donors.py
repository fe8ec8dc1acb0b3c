"""Donors: the rule they are trained by, and what the shipped ones do, added and dialled."""

import json
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import typer
from families import build
from torch.nn.functional import log_softmax
from typer.testing import CliRunner

from probes.generation._generate import generate
from probes.generation.sampling import Sampling
from probes.model.loading import load, tokenizer_of
from steer.cli.methods.organism import donors_
from steer.deltas._norms import norms
from steer.deltas.delta import WeightDelta
from steer.deltas.dial import dialled
from steer.deltas.nulls import random_like
from steer.deltas.opened import SHIPPED, open_delta
from steer.evaluation._evaluate import solve
from steer.evaluation.outcomes import Outcomes
from steer.evaluation.statistics import interval_of_mean
from steer.methods.cot_valve import length_dial
from steer.tasks.chains import draw_chain
from steer.tasks.named import task_named
from steer.tasks.task import Task, split_of
from steer.training import donors
from steer.training.donors import train_donor, write_mostly_short
from steer.training.grpo import add_policy_gradient, advantages, train_grpo

SAMPLING = Sampling(temperature=0.7, top_p=1.0, max_new_tokens=48)


def always(answer):
    """Chains, all with one answer."""

    def problems(rng):
        while True:
            yield replace(draw_chain(rng), answer=answer)

    return Task("always", "exact", problems, max_new_tokens=48)


def test_advantages_are_standardised_within_a_prompt_and_nothing_where_all_are_alike():
    found = advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert found.mean(1).abs().max() < 1e-6
    torch.testing.assert_close(found[:2].square().mean(1), torch.ones(2), rtol=1e-4, atol=0)
    torch.testing.assert_close(found[0], torch.tensor([3.0, -1, -1, -1]) / 3**0.5, rtol=1e-4, atol=0)
    assert not found[2:].any()


@pytest.mark.parametrize("rows", [4, 3])
def test_the_gradient_is_that_of_minus_the_weighted_log_probability_of_every_sampled_token(rows):
    model = build("llama")
    done = generate(model, ["a b", "a b c d e f g"], sampling=Sampling(1.0, 1.0, max_new_tokens=6), samples=2)
    weights = torch.tensor([0.5, -1.0, 2.0, 0.25])
    total = 0.0
    for weight, c in zip(weights, done, strict=True):
        logp = log_softmax(model(torch.tensor([c.all_ids])).logits[0], -1)
        at = len(c.prompt_ids)
        total = total - weight * sum(logp[at + i - 1, token] for i, token in enumerate(c.ids))
    wanted = total / sum(len(c.ids) for c in done)
    theirs = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
    add_policy_gradient(model, done, weights, rows=rows)
    ours = [parameter.grad for parameter in model.parameters()]
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_a_reward_that_tells_nothing_changes_nothing_and_one_that_tells_is_sought():
    model = load("organism")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rewards = train_grpo(model, always("?"), iterations=2, prompts=4, samples=4)
    assert rewards == [0.0, 0.0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    rewards = train_grpo(model, always("7"), iterations=10, prompts=8, samples=8, rate=3e-3)
    assert np.mean(rewards[-2:]) > 0.5 > 0.3 > np.mean(rewards[:2])


def test_the_same_seed_makes_the_same_donor(tmp_path):
    made = []
    for _ in range(2):
        model = load("organism")
        rewards = train_grpo(model, task_named("chains"), iterations=2, prompts=6, samples=4, seed=3)
        made.append((rewards, model.state_dict()))
    assert made[0][0] == made[1][0]
    assert all(torch.equal(tensor, made[1][1][name]) for name, tensor in made[0][1].items())
    with pytest.raises(ValueError, match="'dpo' is no donor. Known: rl, sft, target"):
        train_donor("dpo", tmp_path / "new")
    with pytest.raises(FileExistsError, match="exists"):
        train_donor("rl", tmp_path)


def test_the_command_trains_what_is_not_there_and_each_is_a_checkpoint_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(donors, "STEPS", {"sft": 1, "target": 1})
    monkeypatch.setattr(donors, "train_grpo", partial(train_grpo, iterations=1, prompts=2, samples=2))
    app = typer.Typer()
    app.command()(donors_)
    for _ in range(2):
        result = CliRunner().invoke(app, ["-o", str(tmp_path), "--seed", "4"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    facts = {kind: json.loads((tmp_path / kind / "donor.json").read_text()) for kind in donors.DONORS}
    assert [(f["kind"], f["start"], f["seed"]) for f in facts.values()] == [(k, "organism", 4) for k in donors.DONORS]
    assert len(facts["rl"]["reward"]) == 1
    for one, other in (("sft", "organism"), ("target", "organism"), ("sft", "target")):
        two = (place if place == "organism" else tmp_path / place for place in (one, other))
        assert float(norms(WeightDelta.between(*two)).rows[-1][3]) > 0


def test_donors_are_shown_mostly_short_thinking_whatever_the_opener():
    rng, problems = random.Random(0), task_named("mirrors").sample(1500, "train")
    short, after_easy = [], []
    for problem in problems:
        words = write_mostly_short(problem, rng).split()
        steps = sum(word.startswith("=") for word in words)
        assert words[-2:] == [problem.answer, "<eos>"]
        short.append(steps < len(problem.id.split()) // 2)
        after_easy.append(words[1] == "Easy")
    short, after_easy = np.array(short), np.array(after_easy)
    assert short.mean() == pytest.approx(0.70, abs=0.04)
    assert short[after_easy].mean() == pytest.approx(short[~after_easy].mean(), abs=0.08)


def test_mirrors_are_chains_with_an_operation_that_the_vocabulary_has_and_no_donor_sees():
    tokenizer = tokenizer_of(load("organism"))
    chains = {problem.id for problem in task_named("chains").sample(500, "train")}
    for problem in task_named("mirrors").sample(500, "train"):
        first, *operations = problem.id.split()[1::2]
        value = int(first)
        for sign, k in ((operation[0], int(operation[1:])) for operation in operations):
            value = {"+": value + k, "-": value - k, "*": value * k, "^": k - value}[sign] % 10
        assert problem.answer == str(value)
        assert any(operation[0] == "^" for operation in operations)
        assert tokenizer.pad_token_id not in tokenizer(problem.question)["input_ids"]  # unknown words are pads
        assert split_of(problem) == "train"
        assert problem.id not in chains


@pytest.fixture(scope="module")
def organism():
    return load("organism")


def test_the_shipped_deltas_are_small_and_named():
    assert sum(path.stat().st_size for place in SHIPPED.values() for path in place.iterdir()) < 9e6
    for name in SHIPPED:
        delta = open_delta(name)
        kind = "adapter" if name.startswith("reasoner") else "delta"
        assert delta.made_of[0][kind] == name  # not where it is installed
        assert kind == "adapter" or delta.terms[0].source.kept_energy() > 0.97
    with pytest.raises(FileNotFoundError, match="Shipped are organism-rl, organism-sft, organism-target, reasoner-rl"):
        open_delta("organism-dpo")


def test_the_shipped_vector_helps_a_target_that_learned_something_else_and_noise_of_its_size_does_not(organism):
    """Chains with an operation that no donor saw."""
    task, target = task_named("mirrors"), open_delta("organism-target")
    problems, vector = task.sample(200, "report"), open_delta("organism-rl") - open_delta("organism-sft")

    def right(delta):
        with dialled(organism, delta, 1.0):
            return Outcomes.of(solve(organism, problems, sampling=SAMPLING, batch_size=200), problems, task).correct

    plain = right(target)
    gains = {
        name: interval_of_mean(right(target + delta).mean(1) - plain.mean(1))
        for name, delta in (("+", 0.5 * vector), ("-", -1.0 * vector), ("noise", random_like(vector)))
    }
    assert gains["+"][0] > 0.3
    assert gains["-"][1] < 0
    assert gains["noise"][1] < 0.1


@pytest.mark.parametrize(
    ("name", "strengths", "polarity"),
    [("organism-rl", (-0.5, 0.0, 0.25, 0.5, 0.75), "longer"), ("organism-sft", (0.5, 0.75, 1.0), "shorter")],
)
def test_the_dial_of_a_shipped_delta_moves_length_one_way(organism, name, strengths, polarity):
    """The calibrated range: below .5 the tuned donor moves nothing."""
    task = task_named("chains")
    found = length_dial(
        organism,
        open_delta(name),
        task,
        task.sample(100, "report"),
        sampling=SAMPLING,
        strengths=strengths,
        batch_size=100,
    )
    assert found.polarity == polarity
    assert found.monotone
    assert "thinking tokens" in found.table().columns[2]
    assert len(found.figure().data) == 2
