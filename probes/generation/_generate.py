"""Batched generation: prompts in, completions out, in the order of the prompts."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from probes.generation._batch import Transformers, end_ids
from probes.generation._progress import bar_of
from probes.generation.completions import Completion
from probes.generation.engine import Engine, Row, Written
from probes.generation.sampling import CUT, Decoding, Sampling
from probes.generation.settings import one_draw_a_token
from probes.generation.store import Store
from probes.model.delimiters import read_turn
from probes.model.loading import delimiters_if_any, origin_of, tokenizer_of
from probes.model.positions import check_room, rope_groups
from probes.model.tokens import Prompt, Template, check_prompts, decode, encode_prompt
from probes.words import checked

if TYPE_CHECKING:
    from tqdm import tqdm

_ROUNDS = 4  # times the batch size


@checked
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    ids: Sequence[str] | None = None,
    sampling: Sampling | None = None,
    samples: int = 1,
    batch_size: int = 64,
    template: Template | None = None,
    prefill: Sequence[int] = (),
    decoding: Decoding | None = None,
    store: Path | None = None,
    engine: Engine | None = None,
    judge: Callable[[Completion], bool] | None = None,
    label: str = "generating",
) -> list[Completion]:
    """`samples` completions of each prompt, prompt by prompt.

    `ids` name the prompts (their number, if left out). `template` holds arguments of the chat template, or is `"raw"`
    for texts that a base model continues; `prefill`, token ids that begin the model's turn, is part of the prompt. A
    model without thinking delimiters never thinks: what it writes is its answer. `decoding` decides over tokens beside
    the model. At most `batch_size` rows are written side by side: those that have ended leave, and others take their
    places. With `store`, what has ended is appended to that JSONL file, what it already holds is not generated again,
    and in the end it is in the order of the prompts: a run that was killed and started again ends with the same bytes.
    Randomness belongs to prompt and sample number, so batch size and order change nothing but speed. `engine` writes in
    place of transformers. The progress bar shows tokens a second, and with `judge` the share of new completions that it
    calls right. Raises ValueError where `ids` do not name the prompts one by one, `prompts` are no list, `store` holds
    another model's completions, a prompt is longer than the model's positions, its scores are not numbers, or the
    engine cannot write so.

    >>> from probes import Sampling, generate, load
    >>> model = load("organism")
    >>> completions = generate(model, ["a 3 b +4 c *7", "a 3 b +4 c *7 quick"], sampling=Sampling(temperature=0))
    >>> [(c.thinking, c.answer) for c in completions]
    [('Okay a =3 b +4 =7 c *7 =9', '9'), ('Easy', '6')]
    >>> [(c.id, c.sample) for c in generate(model, ["a 3 b +4 c *7"], ids=["sum"], samples=2)]
    [('sum', 0), ('sum', 1)]
    """
    check_prompts(prompts)
    for name, number in (("samples", samples), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} is {number}, but at least 1 is needed.")
    sampling = sampling or Sampling.of(model)
    names = [str(i) for i in range(len(prompts))] if ids is None else list(ids)
    if len(names) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts came with {len(names)} ids.")
    if len(set(names)) < len(names):
        raise ValueError(f"The id {Counter(names).most_common(1)[0][0]!r} names more than one prompt.")
    tokenizer = tokenizer_of(model)
    encoded = [[*encode_prompt(tokenizer, prompt, template=template), *prefill] for prompt in prompts]
    check_room(model, max(map(len, encoded), default=0), sampling.max_new_tokens)
    name = "" if decoding is None else decoding.name
    engine = Transformers() if engine is None else engine
    engine.check(model, sampling, decoding)
    rows = sorted(
        ((n, sample) for n in range(len(prompts)) for sample in range(samples)), key=lambda row: -len(encoded[row[0]])
    )
    keep = (
        nullcontext()
        if store is None
        else Store.opened(Path(store), model, dict(zip(names, encoded, strict=True)), sampling, name, engine.name)
    )
    progress, ends, run = _Progress(judge), end_ids(model), object()
    with keep as held, one_draw_a_token(model):
        done = {} if held is None else dict(held.rows)
        missing = sum((names[n], sample) not in done for n, sample in rows)
        with bar_of(len(rows), missing, label) as bar:
            at_once = -(-batch_size * _ROUNDS // samples) * samples
            for group in _groups(model, rows, encoded, at_once, sampling.max_new_tokens):
                wanted = [Row(n * samples + i, names[n], i, tuple(encoded[n])) for n, i in group]
                if all((row.name, row.sample) in done for row in wanted):
                    continue
                for written in engine.write(model, wanted, sampling, decoding, batch_size=batch_size, run=run):
                    new = [_read(model, row, sampling, name, set(ends)) for row in written]
                    if new := [c for c in new if (c.id, c.sample) not in done]:
                        new = new if held is None else held.add(new)
                        done.update({(c.id, c.sample): c for c in new})
                        progress.show(bar, new)
        keys = [(name, sample) for name in names for sample in range(samples)]
        if held is not None:
            held.order(keys)
    return [done[key] for key in keys]


def _groups(
    model: PreTrainedModel, rows: list[tuple[int, int]], encoded: list[list[int]], at_once: int, new: int
) -> Iterator[list[tuple[int, int]]]:
    """Rows that are written together, whatever is done already: what is lost to a kill is at most one of these. Each
    holds all samples of its prompts, which a decoding may compare."""
    for group in rope_groups(model, [len(encoded[n]) for n, _ in rows], new):
        for start in range(0, len(group), at_once):
            yield [rows[i] for i in group[start : start + at_once]]


class _Progress:
    """What has been generated so far, in words beside the bar."""

    def __init__(self, judge: Callable[[Completion], bool] | None) -> None:
        self.judge, self.began = judge, time.monotonic()
        self.tokens = self.count = self.right = 0

    def show(self, bar: "tqdm[Any]", new: Sequence[Completion]) -> None:
        self.tokens += sum(len(c.ids) for c in new)
        self.count += len(new)
        words = {"tokens/s": f"{self.tokens / (time.monotonic() - self.began):.0f}"}
        if self.judge is not None:
            self.right += sum(map(self.judge, new))
            words["accuracy"] = f"{self.right / self.count:.3f}"
        bar.set_postfix(words, refresh=False)
        bar.update(len(new))


def _read(model: PreTrainedModel, written: Written, sampling: Sampling, decoding: str, ends: set[int]) -> Completion:
    """What was written as a completion. A row that was ended by another than the model is as long as it was let be."""
    row, new = written.row, written.ids
    length = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
    stopped = length > 0 and new[length - 1] in ends
    new, text = new[:length], new[: length - stopped]
    tokenizer = tokenizer_of(model)
    span, thinking, answer = read_turn(tokenizer, list(row.prompt), text, delimiters_if_any(model))
    cut = any(kind == CUT for kind, _ in written.events)
    return Completion(
        id=row.name,
        sample=row.sample,
        prompt=decode(tokenizer, list(row.prompt)),
        thinking=thinking,
        answer=answer,
        prompt_ids=row.prompt,
        ids=tuple(new),
        span=span,
        stop="eos" if stopped and not cut else "length",
        sampling=sampling,
        model=origin_of(model).name,
        decoding=decoding,
        events=written.events,
    )
