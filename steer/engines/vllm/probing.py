"""Whether a server writes what the run time writes: greedy tokens under each recipe, noted here and asked for there."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probes.generation._batch import end_ids
from probes.model.delimiters import Delimiters, thinking_span
from probes.model.loading import delimiters_if_any, tokenizer_of
from probes.model.tokens import decode, encode_prompt
from probes.tables import Table
from steer.engines._parity import tolerance_of
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied

PROMPTS = (
    "What is 17 times 23?",
    "Anna has 3 boxes with 12 pens each, and gives away 7 pens. How many are left?",
    "A train leaves at nine and travels for two hours at 60 km/h. How far does it go?",
    "Which is larger, 3/7 or 4/9?",
    "Write a short sentence about the sea.",
    "Name a fruit that is yellow.",
    "Why is the sky blue?",
    "Is 91 a prime number?",
)
LENGTH = 24  # tokens of each


@dataclass(frozen=True)
class Written:
    """What the run time wrote: ids, how far the likeliest is ahead of the next at each, and tokens touched."""

    ids: tuple[int, ...]
    ahead: tuple[float, ...]
    touched: int = 0


@dataclass(frozen=True)
class Expected:
    """Prompts, what is written to each by recipe (None is none), and where an answer ends."""

    prompts: tuple[tuple[int, ...], ...]
    written: Mapping[str | None, tuple[Written, ...]]
    ends: frozenset[int]
    tolerance: float

    @classmethod
    def of(
        cls, model: PreTrainedModel, recipes: Mapping[str, Recipe], n_prompts: int, length: int = LENGTH
    ) -> "Expected":
        """By the model as it is loaded here."""
        prompts = prompts_of(model, n_prompts)
        written = {
            name: tuple(greedy(model, ids, recipe, length) for ids in prompts)
            for name, recipe in ((None, None), *recipes.items())
        }
        pad = getattr(model.config, "pad_token_id", None)
        ends = {*end_ids(model), *([] if pad is None else [int(pad)])}
        return cls(prompts, written, frozenset(ends), tolerance_of(model.dtype))


def prompts_of(model: PreTrainedModel, n: int) -> tuple[tuple[int, ...], ...]:
    """As the model is asked (raw, where it has no chat template), in its thinking and, every other one, behind it."""
    tokenizer, delimiters = tokenizer_of(model), delimiters_if_any(model)
    template: Any = None if tokenizer.chat_template else "raw"
    found = []
    for i, text in enumerate(PROMPTS[:n]):
        words = _readable(tokenizer, text, i)
        ids = encode_prompt(tokenizer, words, template=template)
        thought = tokenizer.encode(words, add_special_tokens=False)[:4] if i % 2 else None
        found.append(tuple(_within(ids, delimiters, thought)))
    return tuple(found)


def _within(ids: list[int], delimiters: Delimiters, thought: list[int] | None) -> list[int]:
    """With the thinking open; or closed behind a thought. Left to itself, the model may not come so far."""
    if not delimiters.open:
        return ids
    span = thinking_span(ids, (), delimiters)
    opened = ids if span is not None and not span.closed else [*ids, *delimiters.open]
    return opened if thought is None else [*opened, *thought, *delimiters.close]


def _readable(tokenizer: PreTrainedTokenizerBase, text: str, seed: int) -> str:
    """The text; or where the vocabulary lacks its words, words that it has."""
    lost = {tokenizer.unk_token_id, tokenizer.pad_token_id}
    if not lost & set(tokenizer.encode(text, add_special_tokens=False)):
        return text
    plain = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    drawn = torch.randint(len(plain), (8,), generator=torch.Generator().manual_seed(seed))
    return decode(tokenizer, [plain[i] for i in drawn.tolist()])


def greedy(model: PreTrainedModel, prompt: Sequence[int], recipe: Recipe | None, length: int) -> Written:
    """The likeliest token again and again, whatever the model's own settings are, and past its ends."""
    if recipe is None:
        return _greedy(model, prompt, length)
    with applied(model, recipe, must_fire=False) as log:
        written = _greedy(model, prompt, length)
    return Written(written.ids, written.ahead, log.tokens)


def compared(expected: Written, ids: Sequence[int], ends: frozenset[int], tolerance: float) -> tuple[int | None, bool]:
    """Where a server's ids first differ, up to the end of the answer, and whether either token could stand there."""
    for place, (ours, theirs) in enumerate(zip(expected.ids, [*ids, *[-1] * len(expected.ids)], strict=False)):
        if ours != theirs:
            return place, theirs >= 0 and expected.ahead[place] <= tolerance
        if ours in ends:
            break
    return None, True


class Unanswered(ValueError):
    """A server that fails to answer, whatever it would have written."""


@dataclass(frozen=True)
class Client:
    """A server that is asked as its clients ask it."""

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 300.0

    def written(self, prompt: Sequence[int], length: int, recipe: str | None) -> list[int]:
        """Greedily, with no penalty, whatever the server's own settings are."""
        body: dict[str, Any] = {
            "model": self.model, "prompt": list(prompt), "max_tokens": length, "temperature": 0.0, "ignore_eos": True,
            "return_token_ids": True, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "top_p": 1.0, "top_k": 0, "min_p": 0.0, "n": 1, "seed": 0,
        }  # fmt: skip
        body |= {} if recipe is None else {"vllm_xargs": {"thinksteer": recipe}}
        ids: list[int] = self._asked("/v1/completions", body)["choices"][0]["token_ids"]
        return ids

    def touched(self) -> dict[str, int]:
        """Tokens that each recipe has touched since the start."""
        told = self._asked("/thinksteer/fired")["recipes"]
        return {name: sum(row["tokens"] for row in rows) for name, rows in told.items()}

    def healthy(self) -> bool:
        """Does it answer yet?"""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return int(answer.status) == 200
        except OSError:
            return False

    def _asked(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        headers |= {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, data, headers), timeout=self.timeout
            ) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            text = " ".join(error.read().decode(errors="replace").split())
            raise Unanswered(f"The server answered {path} of the probe with {error.code}: {text:.300}") from error
        except OSError as error:
            raise Unanswered(f"The server did not answer {path} of the probe: {error}.") from error


def probed(client: Client, expected: Expected) -> Table:
    """Ask the server for all that is expected. Raises ValueError where it writes anything else, or does not steer."""
    plain, rows = _asked(client, expected, None), []
    for name, own in expected.written.items():
        before = client.touched() if name is not None else {}
        got = plain if name is None else _asked(client, expected, name)
        near = [_check(name, i, written, ids, expected) for i, (written, ids) in enumerate(zip(own, got, strict=True))]
        touched = 0
        if name is not None:
            touched = client.touched().get(name, 0) - before.get(name, 0)
            _check_steers(name, touched, got, plain, expected)
        rows.append((name or "none", len(near) - sum(near), sum(near), touched))
    title = f"Greedy tokens of {len(expected.prompts)} prompts, as the run time writes them"
    return Table(("recipe", "equal", "equal but for a tie", "tokens touched"), tuple(rows), title)


def _asked(client: Client, expected: Expected, name: str | None) -> list[list[int]]:
    own = expected.written[name]
    return [client.written(ids, len(row.ids), name) for ids, row in zip(expected.prompts, own, strict=True)]


def _check(name: str | None, i: int, written: Written, ids: Sequence[int], expected: Expected) -> bool:
    """Do they differ, by a tie?"""
    place, tie = compared(written, ids, expected.ends, expected.tolerance)
    if not tie:
        assert place is not None
        theirs = ids[place] if place < len(ids) else "missing"
        raise ValueError(
            f"vLLM does not write what the run time writes {_under(name)}: token {place} of its answer to probe {i} is "
            f"{theirs}, but {written.ids[place]} here, which is {written.ahead[place]:.2g} ahead of the next (up to "
            f"{expected.tolerance:g} would be a tie). {_REMEDY}"
        )
    return place is not None


def _check_steers(name: str, touched: int, got: list[list[int]], plain: list[list[int]], expected: Expected) -> None:
    own, none = expected.written[name], expected.written[None]
    if touched <= 0 < sum(written.touched for written in own):
        raise ValueError(
            f"vLLM counts no token that the recipe {name!r} touched, but the run time touches some on the same "
            f"prompts: it does not steer. {_REMEDY}"
        )
    moved = [i for i, (a, b) in enumerate(zip(own, none, strict=True)) if a.ids != b.ids]
    if moved and all(got[i] == plain[i] for i in moved):
        raise ValueError(
            f"vLLM writes the same with the recipe {name!r} as without, but the run time does not: it does not steer. "
            f"{_REMEDY}"
        )


def _under(name: str | None) -> str:
    return "without a recipe" if name is None else f"under the recipe {name!r}"


_REMEDY = "It was ended. Take --engine transformers, or leave the probe out, --probes 0, if you know why."


@torch.no_grad()
def _greedy(model: PreTrainedModel, prompt: Sequence[int], length: int) -> Written:
    given, past, ids, ahead = torch.tensor([list(prompt)], device=model.device), None, [], []
    for _ in range(length):
        out: Any = model(input_ids=given, past_key_values=past, use_cache=True)
        top = out.logits[0, -1].float().topk(2)
        ids.append(int(top.indices[0]))
        ahead.append(float(top.values[0] - top.values[1]))
        past, given = out.past_key_values, top.indices[None, :1]
    return Written(tuple(ids), tuple(ahead))
