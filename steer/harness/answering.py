"""What the harness asks a model for: texts that go on, and how likely given ones are. In plain words, without it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from probes.generation._generate import generate
from probes.generation.engine import Engine
from probes.generation.sampling import Decoding, Sampling
from probes.model.delimiters import read_turn
from probes.model.loading import delimiters_if_any, tokenizer_of
from probes.model.tokens import decode
from probes.thinking.spans import Span
from steer.runtime.effects import log_probabilities

_KNOWN = (
    "until",
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
)
_LENGTH = 256  # new tokens, where a task does not say: the harness' own


@dataclass(frozen=True, eq=False)
class Answering:
    """A model as the harness asks it, with whatever recipe is applied to it.

    Contexts are read as they are: a chat template, where one is asked for, was written into them. `until` of the
    harness cuts the answer, which for a model that thinks is what stands behind its thinking. A `decoding` and an
    `engine` write; likelihoods are read by transformers. `max_new_tokens` overrules the task's own limit, which is too
    short to think in. With `store`, a folder, completions are kept there.

    >>> from probes import load
    >>> from steer.harness import Answering
    >>> answering = Answering(load("organism"))
    >>> answering.written([("<bos> a 3 b +4 ?", {"until": ["<eos>"], "max_gen_toks": 24})])
    ['1']
    >>> [(round(total, 2), greedy) for total, greedy in answering.likelihoods([("<bos> a 3 b +4 ? <think>", " Okay")])]
    [(-0.76, True)]
    """

    model: PreTrainedModel
    decoding: Decoding | None = None
    engine: Engine | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    store: Path | None = None
    seed: int = 0

    def written(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The answers, in the order of the requests. Raises ValueError for settings that are not known."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, (_, settings) in enumerate(requests):
            groups.setdefault(_key(settings), []).append(number)
        answers = [""] * len(requests)
        for numbers in groups.values():
            settings = requests[numbers[0]][1]
            for number, text in zip(numbers, self._group([requests[i][0] for i in numbers], settings), strict=True):
                answers[number] = text
        return answers

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each context and continuation: the continuation's log-probability in nats, and whether it is what greedy
        decoding would write."""
        encoded = [self._pair(*pair) for pair in pairs]
        return self._likely([(ids, begin) for ids, begin in encoded])

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each whole text, behind the token that begins one."""
        rows = [(self._begun(self._encoded(text)), 1) for text in texts]
        return [total for total, _ in self._likely(rows)]

    def chat(self, turns: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as the model's template writes it."""
        apply: Any = tokenizer_of(self.model).apply_chat_template
        return str(
            apply(
                [dict(turn) for turn in turns],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _group(self, contexts: list[str], settings: Mapping[str, Any]) -> list[str]:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        names = [sha256(context.encode()).hexdigest()[:16] for context in contexts]
        once = dict(zip(names, contexts, strict=True))  # a question that is asked twice is answered once
        completions = generate(
            self.model,
            list(once.values()),
            ids=list(once),
            sampling=self._sampling(settings),
            template="raw",
            batch_size=self.batch_size,
            decoding=self.decoding,
            engine=self.engine,
            store=None if self.store is None else self.store / f"{_digest(settings)}.jsonl",
            label="answering",
        )
        tokenizer, delimiters = tokenizer_of(self.model), delimiters_if_any(self.model)
        answers = {}
        for completion in completions:
            said = list(completion.ids[:-1] if completion.stop == "eos" else completion.ids)
            span, _, answer = read_turn(tokenizer, list(completion.prompt_ids), said, delimiters)
            text = decode(tokenizer, said, special=False) if span is None else answer
            answers[completion.id] = _cut(text, stops)
        return [answers[name] for name in names]

    def _sampling(self, settings: Mapping[str, Any]) -> Sampling:
        given = next((settings[k] for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if k in settings), _LENGTH)
        own = Sampling(temperature=0.0, max_new_tokens=self.max_new_tokens or int(given), seed=self.seed)
        temperature = float(settings.get("temperature") or 0.0)
        if not settings.get("do_sample", temperature > 0) or not temperature:
            return own
        top_p, top_k, min_p = (settings.get(name) for name in ("top_p", "top_k", "min_p"))
        return replace(
            own,
            temperature=temperature,
            top_p=1.0 if top_p is None else float(top_p),
            top_k=int(top_k or 0),
            min_p=float(min_p or 0.0),
        )

    def _pair(self, context: str, continuation: str) -> tuple[tuple[int, ...], int]:
        """As the harness cuts a pair: spaces at the end of the context belong to what follows; an empty context is the
        token that begins a text."""
        if not context:
            return self._begun(self._encoded(continuation)), 1
        bare = context.rstrip()
        whole = tuple(self._encoded(context + continuation))
        begin = len(self._encoded(bare if bare else context))
        return whole, begin

    def _encoded(self, text: str) -> list[int]:
        tokenizer = tokenizer_of(self.model)
        begun = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
        return [int(token) for token in tokenizer.encode(text, add_special_tokens=not begun)]

    def _begun(self, ids: Sequence[int]) -> tuple[int, ...]:
        tokenizer = tokenizer_of(self.model)
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return tuple(ids) if ids and ids[0] == first else (int(first), *ids)

    def _likely(self, rows: Sequence[tuple[tuple[int, ...], int]]) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted((i for i, (ids, begin) in enumerate(rows) if begin < len(ids)), key=lambda i: -len(rows[i][0]))
        for start in range(0, len(order), self.batch_size):
            here = order[start : start + self.batch_size]
            spans = [Span(rows[i][0], rows[i][1] - 1, len(rows[i][0]) - 1) for i in here]
            said = log_probabilities(self.model, spans, None)
            for row, i in enumerate(here):
                ids, begin = rows[i]
                own = said[row, -(len(ids) - begin) :]
                targets = own.new_tensor(ids[begin:]).long()
                chosen = own.gather(1, targets[:, None])[:, 0]
                found[i] = (float(chosen.sum()), bool((own.argmax(1) == targets).all()))
        return found


def _key(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    if unknown := sorted(set(settings) - set(_KNOWN)):
        raise ValueError(
            f"The task generates with {', '.join(unknown)}, which is not known here. Known: {', '.join(_KNOWN)}."
        )
    return tuple(sorted((name, str(value)) for name, value in settings.items()))


def _digest(settings: Mapping[str, Any]) -> str:
    return sha256(repr(_key(settings)).encode()).hexdigest()[:12]


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop:
            text = text.split(stop, 1)[0]
    return text
