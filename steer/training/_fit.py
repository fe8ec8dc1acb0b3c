"""Fit a causal LM to prompts with their completions."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.tasks.task import Problem

Example = tuple[Sequence[int], Sequence[int]]  # a prompt and its completion, as token ids
Batch = tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]


@dataclass(frozen=True)
class Schedule:
    """The share of the rate at each step: a warm-up, constant up to the share `constant` of the steps, then linear."""

    warm_up: int = 100
    constant: float = 0.5
    last: float = 0.05

    def at(self, step: int, steps: int) -> float:
        falling = (1.0 - self.last) * (step / steps - self.constant) / (1.0 - self.constant)
        return min(1.0, (step + 1) / self.warm_up) * min(1.0, 1.0 - falling)


def fit(
    model: PreTrainedModel,
    data: Iterator[Batch],
    *,
    steps: int,
    rate: float,
    weight_decay: float,
    label: str,
    schedule: Schedule = Schedule(),  # noqa: B008
) -> None:
    """AdamW on cross-entropy, in place, of the parameters that require a gradient.

    `data` gives batches as `collate` makes them; gradients are clipped to norm 1. The loss is computed where there are
    labels alone: the logits of whole batches of a large vocabulary would be gigabytes.

    >>> from probes import load
    >>> from steer.training import collate, fit
    >>> model = load("organism")
    >>> before = model.lm_head.weight.detach().clone()
    >>> data = iter([collate([([5, 6], [7]), ([5], [7, 8, 9])])])
    >>> fit(model, data, steps=1, rate=1e-3, weight_decay=0.0, label="one step")
    >>> model.lm_head.weight.equal(before)
    False
    """
    optimizer = adam(model, rate, weight_decay)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.at(step, steps))
    for _ in tqdm(range(steps), desc=label, unit="step"):
        surprises(model, next(data))[0].mean().backward()
        descend(model, optimizer)
        rates.step()


def adam(model: PreTrainedModel, rate: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay)


def surprises(model: PreTrainedModel, batch: Batch) -> tuple[Float[Tensor, " labels"], Int[Tensor, " labels"]]:
    """-log p of each label, in nats, and the row that it is in."""
    ids, labels, mask = (part.to(model.device) for part in batch)
    rows, before = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    states = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[rows, before]
    logits = model.get_output_embeddings()(states).float()
    return cross_entropy(logits, labels[rows, before + 1], reduction="none"), rows


def descend(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """One step along the gradient, clipped to norm 1."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def training_batches(
    tokenizer: PreTrainedTokenizerBase,
    problems: Iterator[Problem],
    write: Callable[[Problem], str],
    rng: random.Random,
    *,
    size: int = 64,
) -> Iterator[Batch]:
    """Batches of like length, in an order that `rng` draws, without end.

    `write` gives a problem's completion, as words of the organism's tokenizer; `size` is rows a batch.

    >>> import random
    >>> from probes import load
    >>> from probes.model import tokenizer_of
    >>> from steer import task_named
    >>> from steer.training import training_batches
    >>> problems = task_named("chains").stream("train", seed=0)
    >>> write = lambda problem: f"<think> </think> {problem.answer} <eos>"
    >>> data = training_batches(tokenizer_of(load("organism")), problems, write, random.Random(0), size=4)
    >>> [tuple(part.shape) for part in next(data)]
    [(4, 20), (4, 20), (4, 20)]
    """

    def examples() -> Iterator[Example]:
        for problem in problems:
            yield tokenizer(f"<bos> {problem.question} ?")["input_ids"], tokenizer(write(problem))["input_ids"]

    return batched(examples(), rng, size)


def batched(examples: Iterator[Example], rng: random.Random, size: int) -> Iterator[Batch]:
    """Prompts with their completions in batches of like length, in an order that `rng` draws."""
    while True:
        rows = sorted(islice(examples, size * 16), key=lambda row: len(row[0]) + len(row[1]))
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            yield collate(chunk)


def collate(rows: Sequence[Example]) -> Batch:
    """Prompts with their completions, as token ids: ids, labels (the completion only), attention mask.

    Each is [batch, pos]. Rows are filled up on the right; a label of -100 is not learned.

    >>> from steer.training import collate
    >>> ids, labels, mask = collate([([5, 6], [7]), ([5], [7, 8, 9])])
    >>> labels.tolist(), mask.tolist()
    ([[-100, -100, 7, -100], [-100, 7, 8, 9]], [[1, 1, 1, 0], [1, 1, 1, 1]])
    """
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[i, :end] = torch.tensor([*prompt, *completion])
        labels[i, len(prompt) : end] = torch.tensor(completion)
    mask = torch.arange(width) < torch.tensor([len(p) + len(c) for p, c in rows])[:, None]
    return ids, labels, mask.long()
