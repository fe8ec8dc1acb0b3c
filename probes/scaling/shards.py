"""Shards: the batches that one process would read, fixed by the rows and a budget of tokens, and by nothing else."""

from collections.abc import Sequence

from probes.activations._record import cut
from probes.generation.completions import Completion
from probes.thinking.spans import Span


def shards_of_spans(spans: Sequence[Span], shard_tokens: int) -> list[list[Span]]:
    """The spans of each batch that `record` would read; a text is in one shard, with all of its spans."""
    owners: dict[tuple[int, ...], list[Span]] = {}
    for span in spans:
        owners.setdefault(span.ids, []).append(span)
    texts = list(owners)
    rows = cut(range(len(texts)), [len(ids) for ids in texts], shard_tokens)
    return [[span for row in shard for span in owners[texts[row]]] for shard in rows]


def shards_of_completions(completions: Sequence[Completion], shard_tokens: int) -> list[list[Completion]]:
    """The completions of each batch that `read_experts` would read."""
    rows = cut(range(len(completions)), [len(c.all_ids) for c in completions], shard_tokens)
    return [[completions[row] for row in shard] for shard in rows]
