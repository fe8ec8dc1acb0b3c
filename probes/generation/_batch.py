"""Rows that are written side by side: those that have ended leave the batch, and those that wait take their places."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from probes.generation.caches import begun, is_movable, rearranged, widened
from probes.generation.engine import Row, Written
from probes.generation.sampling import Decoding, DecodingRun, ListeningRun, Sampling, TurningRun, row_key
from probes.generation.settings import NumbersOnly, counts_steps
from probes.model.loading import tokenizer_of
from probes.model.passes import holding
from probes.model.positions import passes_rope_limit
from probes.rows import Rows

SHARE = 8  # of a batch: that many have ended, or fewer, before its rows move together, which costs about a step


@dataclass(eq=False)
class _Part:
    """Rows side by side: their tokens so far, padded on the left, and what the model's next pass needs."""

    rows: list[Row]
    begins: list[int]
    ids: Int[Tensor, "batch pos"]
    state: dict[str, Any]
    ended: Bool[Tensor, " batch"]

    @property
    def width(self) -> int:
        return self.ids.shape[1]


class Transformers:
    """Our own batches over transformers, with whatever is hooked to the model."""

    name = "transformers"

    def check(self, model: PreTrainedModel, sampling: Sampling, decoding: Decoding | None) -> None:
        """It writes whatever it is asked."""

    def write(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        sampling: Sampling,
        decoding: Decoding | None,
        *,
        batch_size: int,
        run: object,
    ) -> Iterator[list[Written]]:
        """The rows as they end, at most `batch_size` side by side.

        Which rows are side by side at which step follows from the rows alone, so that they come out the same to the bit
        when they are written again. Where rows have to be together from their first token on, nobody joins; nor where
        settings count a batch's steps, or the decoding or the model's cache cannot follow: then a batch is written to
        its end, and the next begins.
        """
        together = passes_rope_limit(model, max(len(row.prompt) for row in rows) + sampling.max_new_tokens)
        waiting = deque(rows)
        while waiting:
            with ExitStack() as listening:
                batch = Batch(model, sampling, decoding, run, listening)
                batch.open([waiting.popleft() for _ in range(min(batch_size, len(waiting)))])
                joins = not together and batch.turns and not counts_steps(model)
                while batch.part is not None:
                    batch.run_on(batch_size if waiting and joins else 0)
                    new = batch_size - batch.live if joins else 0
                    yield batch.turn([waiting.popleft() for _ in range(min(new, len(waiting)))], trim=joins)


class Batch:
    """What is written now. With `turns`, rows may leave and join: cache and decoding follow them."""

    _now: Rows
    _arranged: "_Arranged"

    def __init__(
        self, model: PreTrainedModel, sampling: Sampling, decoding: Decoding | None, name: object, listening: ExitStack
    ) -> None:
        tokenizer, own = tokenizer_of(model), model.generation_config
        self.model, self.sampling, self.decoding, self.name = model, sampling, decoding, name
        self.listening = listening
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.ends = torch.tensor(end_ids(model), device=model.device)
        self.config = GenerationConfig(
            do_sample=False,  # the draw is in the processors
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=end_ids(model),
            pad_token_id=self.pad,
            repetition_penalty=own.repetition_penalty if own is not None else None,
        )
        self.run: DecodingRun | None = None
        self.part: _Part | None = None
        self.turns, self.live = False, 0
        self._settings, self._blank = LogitsProcessorList(), dict[str, Any]()

    @torch.no_grad()
    def open(self, rows: list[Row]) -> None:
        """These rows are the first."""
        self.part = part = self._begin(rows)
        self.turns = is_movable(part.state, len(rows)) and (self.run is None or isinstance(self.run, TurningRun))
        self.live = len(rows)

    @torch.no_grad()
    def run_on(self, wanted: int, pause: Callable[[], bool] = lambda: False) -> None:
        """Write until rows may move: until all have ended, one has come to its limit, or enough of them have ended, of
        those here or of the number that is wanted here. Or, at any token, until `pause` says so."""
        part = self.part
        assert part is not None
        every = 1 if part.ids.device.type == "cpu" else SHARE  # asking a device means waiting for it
        enough = max(1, max(len(part.rows), wanted) // SHARE) if self.turns else len(part.rows)
        limits, over = [row.limit(self.sampling) for row in part.rows], any if self.turns else all
        decode: Any = self.model
        with decode._optimize_model_for_decode():
            while True:
                spent = over(part.width - begin >= most for begin, most in zip(part.begins, limits, strict=True))
                now = spent or pause()
                if now or (part.width - max(part.begins)) % every == 0:
                    gone = int(part.ended.sum())
                    if now or gone >= enough:
                        self.live = len(part.rows) - gone
                        return
                self._step(part)

    @torch.no_grad()
    def turn(self, rows: list[Row], *, trim: bool) -> list[Written]:
        """The rows that have ended, which leave; new rows take their places."""
        part = self.part
        assert part is not None
        self._arranged.numbers.check([row.name for row in part.rows])
        ended, ids = part.ended.tolist(), part.ids.tolist()
        events = [()] * len(ended) if self.run is None else self.run.events()
        written = [
            Written(row, ids[at][begin : begin + row.limit(self.sampling)], tuple(events[at]))
            for at, (row, begin) in enumerate(zip(part.rows, part.begins, strict=True))
            if ended[at]
        ]
        stay = [at for at, over in enumerate(ended) if not over]
        parts = [(part, stay)] if stay else []
        if rows:
            new = self._begin(rows)
            self._arranged.numbers.check([row.name for row in rows])
            parts.append((new, list(range(len(rows)))))
        self.part = self._arrange(parts, trim=trim) if parts else None
        self.live = sum(len(own) for _, own in parts)
        return written

    def _begin(self, rows: list[Row]) -> _Part:
        """Rows with their prompts read, and their first token."""
        width, device = max(len(row.prompt) for row in rows), self.model.device
        ids = torch.tensor([[self.pad] * (width - len(r.prompt)) + list(r.prompt) for r in rows], device=device)
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in rows], device=device)
        part = _Part(rows, [width] * len(rows), ids, {}, torch.zeros(len(rows), dtype=torch.bool, device=device))
        if self.decoding is not None and self.part is None:
            self.run = self.decoding.begin(mask)
            if isinstance(self.run, ListeningRun):
                self.listening.enter_context(self.run.listening())
        self._announce(part, mask)
        part.state = self._prepared(ids, mask) if self.part is None else begun(self._blank, mask)
        model: Any = self.model
        inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **part.state)
        with self._holding(part.state):
            out = model(**inputs, return_dict=True)
        self._take(part, out)
        return part

    def _prepared(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """What transformers makes of a batch before its first pass; its settings, and a copy for those who join."""
        found: dict[str, Any] = {}

        def take(model: object, input_ids: Tensor, logits_processor: LogitsProcessorList, **rest: Any) -> Tensor:  # noqa: ARG001
            self._settings = logits_processor
            for setting in logits_processor:  # which of transformers's know of padding, as this batch has it
                if isinstance(getattr(setting, "prompt_ignore_length", None), Tensor):
                    setattr(setting, "prompt_ignore_length", None)  # rows come and go: `unpadded` tells it
            found.update(rest)
            return input_ids

        write: Any = self.model.generate
        write(ids, attention_mask=mask, generation_config=self.config, custom_generate=take)
        state = {k: v for k, v in found.items() if k not in ("stopping_criteria", "generation_config", "synced_gpus")}
        kept = {k: v for k, v in state.items() if v is not None or k == "attention_mask"}
        self._blank = deepcopy({k: None if isinstance(v, Tensor) else v for k, v in kept.items()})
        return state

    def _step(self, part: _Part) -> None:
        """One token more of each row."""
        model: Any = self.model
        new = 1 if part.state.get("use_cache") else None
        inputs = model.prepare_inputs_for_generation(part.ids, next_sequence_length=new, **part.state)
        with self._holding(part.state):
            out = model(**inputs, return_dict=True)
        self._take(part, out)

    def _holding(self, state: dict[str, Any]) -> AbstractContextManager[None]:
        """Whoever listens to the model is told the rows; without a cache each pass begins anew, and needs no names."""
        return holding(self.model, self._now if state.get("use_cache") else None)

    def _take(self, part: _Part, out: Any) -> None:
        """The next token of each row, as the settings, the draw and the decoding have it."""
        model: Any = self.model
        part.state = model._update_model_kwargs_for_generation(out, part.state)
        scores = out.logits[:, -1].to(copy=True, dtype=torch.float32, device=part.ids.device)
        ids: Any = part.ids
        own = self._settings(self._arranged.unpadded(ids), scores) if self._settings else scores
        scores = self._arranged.processors(ids, own)
        tokens = scores.argmax(1).masked_fill(part.ended, self.pad)
        part.ids = torch.cat([part.ids, tokens[:, None]], 1)
        part.ended = part.ended | torch.isin(tokens, self.ends) | (part.width >= self._arranged.most)

    def _arrange(self, parts: list[tuple[_Part, list[int]]], *, trim: bool) -> _Part:
        """Rows of what was written, and new ones, side by side."""
        rows = [part.rows[at] for part, own in parts for at in own]
        new = [part.width - part.begins[at] for part, own in parts for at in own]
        width = max(len(row.prompt) + n for row, n in zip(rows, new, strict=True)) if trim else parts[0][0].width
        pads = [width - len(row.prompt) - n for row, n in zip(rows, new, strict=True)]
        part = _Part(
            rows,
            [width - n for n in new],
            torch.cat([widened(part.ids[own], width, self.pad) for part, own in parts]),
            rearranged([(p.state, own) for p, own in parts], width, torch.tensor(pads, device=parts[0][0].ids.device)),
            torch.cat([part.ended[own] for part, own in parts]),
        )
        self._announce(part, None)
        return part

    def _announce(self, part: _Part, mask: Tensor | None) -> None:
        """From here on these rows are written; where there is a mask of their prompts, they begin."""
        numbers, begins, ends = tuple(row.number for row in part.rows), tuple(part.begins), tuple(self.ends.tolist())
        if mask is None:
            self._now = Rows(self.name, numbers, begins, ends, n_past=part.width - 1)
        else:
            self._now = Rows(self.name, numbers, begins, ends, joining=self.part is not None)
        if isinstance(self.run, TurningRun):
            self.run.turn(self._now, mask)
        seeds = [self.sampling.seed if row.seed is None else row.seed for row in part.rows]
        keys = [row_key(list(row.prompt), seed, row.sample) for row, seed in zip(part.rows, seeds, strict=True)]
        draw, valid = self.sampling.processors(keys, part.begins, part.ids.device), NumbersOnly()
        own = draw if self.run is None else self.run.processors(draw)
        most = [begin + row.limit(self.sampling) for row, begin in zip(part.rows, part.begins, strict=True)]
        limits = torch.tensor(most, device=part.ids.device)
        pads = [begin - len(row.prompt) for row, begin in zip(part.rows, part.begins, strict=True)]
        padding = torch.tensor([pads, [row.prompt[0] for row in part.rows]], device=part.ids.device)
        self._arranged = _Arranged(valid, LogitsProcessorList([valid, *own]), limits, padding)


@dataclass(frozen=True)
class _Arranged:
    """What decides the next tokens of rows that are side by side, how wide the batch is when each has its last, and by
    how many tokens each is padded, with its first own one."""

    numbers: NumbersOnly
    processors: LogitsProcessorList
    most: Int[Tensor, " batch"]
    padding: Int[Tensor, "2 batch"]

    def unpadded(self, ids: Int[Tensor, "batch pos"]) -> Any:
        """Each row's first own token in place of its padding, which would count as said: the pad is often an end."""
        before = torch.arange(ids.shape[1], device=ids.device) < self.padding[0][:, None]
        return torch.where(before, self.padding[1][:, None], ids)


def end_ids(model: PreTrainedModel) -> list[int]:
    """The tokens that end a completion: the generation config's, else the tokenizer's."""
    own = model.generation_config
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else tokenizer_of(model).eos_token_id
    return list(ends) if isinstance(ends, list) else [ends]
