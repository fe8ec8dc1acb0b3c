"""Reinforcement with a verifiable reward: GRPO *(Shao et al. 2024)* at its smallest, for models that fit in memory."""

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from probes.generation.completions import Completion
from probes.generation.sampling import Sampling
from steer.evaluation._evaluate import solve
from steer.tasks.grading import is_correct
from steer.tasks.task import Problem, Task
from steer.training._fit import adam, collate, descend, surprises


def train_grpo(
    model: PreTrainedModel,
    task: Task,
    *,
    iterations: int = 50,
    prompts: int = 32,
    samples: int = 8,
    rate: float = 3e-4,
    warm_up: int = 1,
    scaled: bool = True,
    rows: int | None = None,
    policy: Callable[[], PreTrainedModel] | None = None,
    seed: int = 0,
    label: str = "reinforcing",
) -> list[float]:
    """Train the model in place on problems of the split `train`; the share of right answers, iteration by iteration.

    The reward is 1 for a right answer, else 0. Each iteration samples at temperature 1 and takes one step of AdamW:
    the ratio of policies is then 1, so that nothing is clipped. No KL term.

    Args:
        warm_up: iterations over which the rate rises.
        scaled: divide advantages by the standard deviation among the samples of a prompt.
        rows: completions whose gradient is computed at once; all, if left out.
        policy: gives the model that samples, with the weights of now, where that is not `model` itself.

    >>> from probes import load
    >>> from steer import task_named
    >>> from steer.training import train_grpo
    >>> train_grpo(load("organism"), task_named("chains"), iterations=1, prompts=2, samples=2)
    [0.25]
    """
    optimizer = adam(model, rate)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))
    problems, rewards = task.stream("train", seed=seed), []
    bar = tqdm(range(iterations), desc=label, unit="step")
    for i in bar:
        drawn: dict[str, Problem] = {}
        while len(drawn) < prompts:
            drawn |= {problem.id: problem for problem in islice(problems, prompts - len(drawn))}
        sampling = Sampling(1.0, 1.0, max_new_tokens=task.max_new_tokens, seed=seed * iterations + i)
        sampler = model if policy is None else policy()
        done = solve(sampler, list(drawn.values()), sampling=sampling, samples=samples, batch_size=prompts * samples)
        right = torch.tensor([is_correct(c, drawn[c.id], task.grader) for c in done]).float()
        weights = advantages(right.reshape(prompts, samples), scaled=scaled).flatten()
        add_policy_gradient(model, done, weights, rows=rows or len(done))
        descend(model, optimizer)
        rates.step()
        rewards.append(float(right.mean()))
        bar.set_postfix(right=rewards[-1])
    return rewards


def advantages(rewards: Float[Tensor, "prompts samples"], *, scaled: bool = True) -> Float[Tensor, "prompts samples"]:
    """(r - mean) / std among the samples of a prompt, or r - mean; 0 where they all have one reward."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-6) if scaled else centred


def add_policy_gradient(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    weights: Float[Tensor, " completions"],
    *,
    rows: int,
) -> None:
    """Add to the gradients that of -Σ A log p(token) over the tokens sampled, by their number: GRPO's at ratio 1.

    The mean is over all tokens, not first over those of a completion, which would favour long wrong ones. Completions
    of like length are computed together, `rows` at once.
    """
    order = sorted(range(len(completions)), key=lambda i: len(completions[i].all_ids))
    tokens = sum(len(completion.ids) for completion in completions)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        found, row = surprises(model, collate([(completions[i].prompt_ids, completions[i].ids) for i in chosen]))
        ((weights[chosen].to(found.device)[row] * found).sum() / tokens).backward()
