"""Fit a causal LM to prompts with their completions."""

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.tasks.task import Problem

Batch = tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]


def fit(
    model: PreTrainedModel, data: Iterator[Batch], *, steps: int, rate: float, weight_decay: float, label: str
) -> None:
    """AdamW on cross-entropy, in place. The rate warms up over 100 steps, stays, and falls from the middle on.

    `data` gives batches as `collate` makes them; gradients are clipped to norm 1.

    >>> from probes import load
    >>> from steer.training import collate, fit
    >>> model = load("organism")
    >>> before = model.lm_head.weight.detach().clone()
    >>> data = iter([collate([([5, 6], [7]), ([5], [7, 8, 9])])])
    >>> fit(model, data, steps=1, rate=1e-3, weight_decay=0.0, label="one step")
    >>> model.lm_head.weight.equal(before)
    False
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for _ in tqdm(range(steps), desc=label, unit="step"):
        ids, labels, mask = next(data)
        descend(model, optimizer, model(input_ids=ids, attention_mask=mask, labels=labels).loss)
        schedule.step()


def descend(model: PreTrainedModel, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step along the gradient, clipped to norm 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _rate(step: int, steps: int) -> float:
    """Warm-up over 100 steps, constant to the middle, then linear to 5 %."""
    warm = min(1.0, (step + 1) / 100)
    return warm * min(1.0, 1.0 - 0.95 * (step / steps - 0.5) / 0.5)


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
    while True:
        rows = []
        for _ in range(size * 16):
            problem = next(problems)
            prompt = tokenizer(f"<bos> {problem.question} ?")["input_ids"]
            completion = tokenizer(write(problem))["input_ids"]
            rows.append((prompt, completion))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            yield collate(chunk)


def collate(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
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
