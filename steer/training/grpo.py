"""Reinforcement with a verifiable reward: GRPO *(Shao et al. 2024)* at its smallest, for models that fit in memory."""

from collections.abc import Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from probes.generation.completions import Completion
from probes.generation.sampling import Sampling
from steer.evaluation._evaluate import solve
from steer.tasks.grading import is_correct
from steer.tasks.task import Problem, Task
from steer.training._fit import collate, descend


def train_grpo(
    model: PreTrainedModel,
    task: Task,
    *,
    iterations: int = 50,
    prompts: int = 32,
    samples: int = 8,
    rate: float = 3e-4,
    seed: int = 0,
    label: str = "reinforcing",
) -> list[float]:
    """Train the model in place on problems of the split `train`; the share of right answers, iteration by iteration.

    The reward is 1 for a right answer, else 0. Each iteration samples at temperature 1 and takes one step of AdamW:
    the ratio of policies is then 1, so that nothing is clipped. No KL term.

    >>> from probes import load
    >>> from steer import task_named
    >>> from steer.training import train_grpo
    >>> train_grpo(load("organism"), task_named("chains"), iterations=1, prompts=2, samples=2)
    [0.25]
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    problems, rewards = task.stream("train", seed=seed), []
    bar = tqdm(range(iterations), desc=label, unit="step")
    for i in bar:
        drawn: dict[str, Problem] = {}
        while len(drawn) < prompts:
            drawn |= {problem.id: problem for problem in islice(problems, prompts - len(drawn))}
        sampling = Sampling(1.0, 1.0, max_new_tokens=task.max_new_tokens, seed=seed * iterations + i)
        done = solve(model, list(drawn.values()), sampling=sampling, samples=samples, batch_size=prompts * samples)
        right = torch.tensor([is_correct(c, drawn[c.id], task.grader) for c in done]).float()
        descend(model, optimizer, policy_loss(model, done, advantages(right.reshape(prompts, samples)).flatten()))
        rewards.append(float(right.mean()))
        bar.set_postfix(right=rewards[-1])
    return rewards


def advantages(rewards: Float[Tensor, "prompts samples"]) -> Float[Tensor, "prompts samples"]:
    """(r - mean) / std among the samples of a prompt; 0 where they all have one reward."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-6)


def policy_loss(
    model: PreTrainedModel, completions: Sequence[Completion], weights: Float[Tensor, " completions"]
) -> Float[Tensor, ""]:
    """-Σ A log p(token) over the tokens sampled, by their number: its gradient is that of GRPO's objective at ratio 1.

    The mean is over all tokens, not first over those of a completion, which would favour long wrong ones.
    """
    ids, labels, mask = collate([(c.prompt_ids, c.ids) for c in completions])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    surprise = cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return (weights[:, None] * surprise).sum() / (labels != -100).sum()
