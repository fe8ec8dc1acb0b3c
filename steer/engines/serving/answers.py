"""Answers in OpenAI's shape: whole ones, the chunks of a stream, and refusals."""

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from probes.model.tokens import decode
from steer.engines.serving.reading import ANSWER, TEXT, THINKING, Plain, Reader, Turn, turn_of
from steer.engines.serving.requests import Body
from steer.engines.serving.service import Service
from steer.engines.serving.tickets import Asked, Ended, Refused

Fields = dict[str, Any]
LAST = "data: [DONE]\n\n"
_TYPES = {401: "authentication_error", 500: "server_error", 503: "server_error"}


def refusal(refused: Refused) -> Fields:
    """OpenAI's error object."""
    kind = _TYPES.get(refused.status, "invalid_request_error")
    return {"error": {"message": refused.sentence, "type": kind, "param": refused.parameter, "code": refused.status}}


def event(fields: Mapping[str, Any]) -> str:
    """As a stream has it."""
    return f"data: {json.dumps(fields, allow_nan=False)}\n\n"


@dataclass(eq=False)
class Answer:
    """An answer that is being written, to one request."""

    service: Service
    body: Body
    asked: Asked
    ids: list[int] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    _n_told: int = 0  # of the ids, in a stream

    def whole(self, ended: Ended) -> Fields:
        """Once it is over."""
        turn = self._turn(ended)
        if self.body.chat:
            message = {"role": "assistant", ANSWER: turn.answer, THINKING: turn.thinking}
            choice = {"index": 0, "message": message, "finish_reason": ended.reason, "logprobs": None}
        else:
            choice = {"index": 0, TEXT: turn.answer, "finish_reason": ended.reason, "logprobs": None}
        own = {"token_ids": self.ids} if self.body.return_token_ids else {}
        return self._framed([{**choice, **own}], usage=self._usage(turn), first=True)

    def reader(self) -> Reader | Plain:
        """Tells it piece by piece."""
        own = self.service
        return Reader(own.tokenizer, own.delimiters, self.asked.prompt) if self.body.chat else Plain(own.tokenizer)

    def first(self) -> str:
        """What a stream begins with."""
        return event(self._chunk({"role": "assistant", ANSWER: ""} if self.body.chat else {TEXT: ""}, [], first=True))

    def chunks(self, reader: Reader | Plain, token: int) -> Iterator[str]:
        """What one token more adds to a stream; nothing, where nothing is sure. One that ends a turn says nothing."""
        self.ids.append(token)
        if token not in self.service.ends:
            for name, text in reader.add(token):
                yield event(self._chunk({name: text}, self._untold()))

    def last(self, reader: Reader | Plain, ended: Ended) -> Iterator[str]:
        """What a stream ends with."""
        turn = self._turn(ended)
        for name, text in reader.end(turn):
            yield event(self._chunk({name: text}, self._untold()))
        yield event(self._chunk({} if self.body.chat else {TEXT: ""}, self._untold(), reason=ended.reason))
        if self.body.usage_in_stream:
            yield event(self._framed([], usage=self._usage(turn), chunk=True))
        yield LAST

    def _untold(self) -> Sequence[int]:
        told, self._n_told = self._n_told, len(self.ids)
        return self.ids[told:]

    def _turn(self, ended: Ended) -> Turn:
        said = self.ids[: len(self.ids) - (ended.reason == "stop")]
        tokenizer = self.service.tokenizer
        if not self.body.chat:
            return Turn(None, decode(tokenizer, said, special=False), 0)
        return turn_of(tokenizer, self.asked.prompt, said, self.service.delimiters)

    def _chunk(self, added: Fields, ids: Sequence[int], *, reason: str | None = None, first: bool = False) -> Fields:
        choice: Fields = {"index": 0, "finish_reason": reason, "logprobs": None}
        choice |= {"delta": added} if self.body.chat else added
        choice |= {"token_ids": list(ids)} if self.body.return_token_ids else {}
        return self._framed([choice], chunk=True, first=first)

    def _framed(
        self, choices: list[Fields], *, usage: Fields | None = None, chunk: bool = False, first: bool = False
    ) -> Fields:
        chat, own, recipe = self.body.chat, self.service, self.asked.recipe
        kind = f"chat.completion{'.chunk' if chunk else ''}" if chat else "text_completion"
        fields: Fields = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.name}",
            "object": kind,
            "created": self.created,
            "model": own.name,
            "choices": choices,
        }
        if first:  # what the answer follows from
            fields["thinksteer"] = {
                "recipe": recipe,
                "strength": self.asked.strength if recipe else None,
                "fingerprint": own.fingerprints[recipe] if recipe else None,
                "seed": self.asked.sampling.seed,
            }
            fields |= {"prompt_token_ids": list(self.asked.prompt)} if self.body.return_token_ids else {}
        return fields if usage is None else {**fields, "usage": usage}

    def _usage(self, turn: Turn) -> Fields:
        prompt, new = len(self.asked.prompt), len(self.ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "completion_tokens_details": {"reasoning_tokens": turn.thoughts},
        }
