"""How the stream travels along a chain of thought, from segment to segment: while it is written, or read again."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from probes.activations._meter import Follower, Meter, Trajectory
from probes.activations._record import batches, padded
from probes.generation.completions import Completion
from probes.model.hooks import hook_inputs
from probes.thinking.phases import Clock
from probes.thinking.spans import Span

SEGMENT = 500  # tokens, in the paper


@torch.no_grad()
def read_trajectories(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    *,
    segment: int = SEGMENT,
    batch_tokens: int = 16_384,
    chunk: int = 4_096,
    label: str = "trajectories",
) -> list[Trajectory]:
    """Of each completion, its chain read again. Memory is O(layers x d_model) a row, whatever its length.

    What is read are the generated tokens from the end of the opening delimiter through the closing one, but for the
    completion's very last token, which no pass reads while it is written. Longer texts are read `chunk` tokens at a
    time. Without any thinking there is nothing to read, and all is NaN.

    >>> from probes import generate, load
    >>> from probes.activations import read_trajectories
    >>> model = load("organism")
    >>> completions = generate(model, ["a 3 b +4 c *7", "a 3 quick"])
    >>> [found.segments for found in read_trajectories(model, completions, segment=4)]
    [3, 1]
    """
    _check(segment)
    found: dict[int, Trajectory] = {}
    spans = [Span(c.all_ids, 0, len(c.all_ids)) for c in completions]
    with tqdm(total=len(spans), desc=label, unit="chain", delay=2, leave=False) as bar, ExitStack() as stack:
        meter = Meter(model, segment, _steps(completions, segment))
        stack.enter_context(meter.listening())
        for rows in batches(model, spans, batch_tokens):
            ids, real = padded([spans[row].ids for row in rows])
            wanted = torch.zeros_like(real)
            for i, row in enumerate(rows):
                wanted[i, slice(*thinking_bounds(completions[row]))] = True
            ids, mask, wanted = (x.to(model.device) for x in (ids, real.long(), wanted))
            state, cache = meter.fresh(len(rows)), DynamicCache(config=model.config) if ids.shape[1] > chunk else None
            for start in range(0, ids.shape[1], chunk):
                meter.begin(wanted[:, start : start + chunk])
                upto = mask[:, : start + chunk]
                model(input_ids=ids[:, start : start + chunk], attention_mask=upto, past_key_values=cache,
                      use_cache=cache is not None, logits_to_keep=1)  # fmt: skip
                state = meter.taken(state)
            found.update(zip(rows, meter.finished(state), strict=True))
            bar.update(len(rows))
    return [found[row] for row in range(len(spans))]


@contextmanager
def following(model: PreTrainedModel, *, segment: int = SEGMENT, steps: int = 16) -> Iterator[dict[int, Trajectory]]:
    """While open, follows the chains that the model writes, in O(layers x d_model) a row.

    Gives a dict that fills as rows end: the trajectory of each by its place in what `generate` returns. Rows that a
    store had were not written, and are not in it. Of the steps the first `steps` are kept. Raises ValueError where the
    model has no thinking delimiters, or writes without a cache.

    >>> from probes import generate, load
    >>> from probes.activations import following
    >>> model = load("organism")
    >>> with following(model, segment=3) as found:
    ...     completions = generate(model, ["a 3 b +4 c *7", "a 3 quick"])
    >>> {row: chain.segments for row, chain in found.items()}
    {1: 1, 0: 4}
    """
    _check(segment)
    check_cached(model)
    meter, found = Meter(model, segment, steps), dict[int, Trajectory]()
    follower = Follower(meter, Clock.of(model), lambda numbers, chains: found.update(zip(numbers, chains, strict=True)))
    with hook_inputs(model, follower.see), meter.listening():
        yield found
        follower.end()


def thinking_bounds(completion: Completion) -> tuple[int, int]:
    """The positions [start, stop) of a chain that are read; none where nothing is thought."""
    span = completion.span
    if span is None:
        return 0, 0
    return max(len(completion.prompt_ids), span.first), min(span.end, len(completion.all_ids) - 1)


def check_cached(model: PreTrainedModel) -> None:
    """Raise ValueError where every pass of a run begins anew, so that chains cannot be followed."""
    config = model.generation_config
    if config is not None and config.use_cache is False:
        raise ValueError(
            "Chains are followed from pass to pass, but this model writes without a cache: set "
            "generation_config.use_cache, or read the completions again with read_trajectories."
        )


def _steps(completions: Sequence[Completion], segment: int) -> int:
    """The most steps that one of the chains has."""
    longest = max((stop - start for start, stop in map(thinking_bounds, completions)), default=0)
    return -(-longest // segment)


def _check(segment: int) -> None:
    if segment < 1:
        raise ValueError(f"A segment of {segment} tokens holds nothing: give 1 or more. The paper's is {SEGMENT}.")
