"""The body of a request, read and checked: what is wrong is told in a sentence."""

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from probes.generation.sampling import Sampling
from probes.model.tokens import Message
from steer.engines.serving.keys import CHAT, TEXT, check_keys
from steer.engines.serving.tickets import Refused

Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Body:
    """What a request says. `max_tokens` is None where it leaves that to us, `prompt` a text where it is to go on."""

    prompt: str | Conversation
    template: Mapping[str, Any]
    sampling: Sampling  # but for its limit
    max_tokens: int | None
    recipe: str | None
    strength: float
    stream: bool
    usage_in_stream: bool
    return_token_ids: bool

    @property
    def chat(self) -> bool:
        return not isinstance(self.prompt, str)


def read_body(raw: bytes, usual: Sampling, *, chat: bool, served: str) -> Body:
    """Raises Refused, in a sentence, for whatever is no request. `usual` holds where the request says nothing."""
    body = _parsed(raw)
    check_keys(body, CHAT if chat else TEXT)
    if body.get("model") not in (None, served):
        raise Refused(f"The model {_short(body['model'])} is not served here. Known: {served}.", parameter="model")
    recipe, strength = _steering(body)
    stream = _truth(body, "stream")
    return Body(
        prompt=_messages(body.get("messages")) if chat else _text(body.get("prompt"), "prompt", "prompt"),
        template=_template(body.get("chat_template_kwargs")),
        sampling=_sampling(body, usual),
        max_tokens=_max_tokens(body),
        recipe=recipe,
        strength=strength,
        stream=stream,
        usage_in_stream=_usage_in_stream(body, stream=stream),
        return_token_ids=_truth(body, "return_token_ids"),
    )


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_number)
    except RecursionError:
        raise Refused("The body is not JSON that can be read: it is nested too deeply.") from None
    except ValueError as error:
        raise Refused(f"The body is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise Refused(f"The body is {_kind(body)}, and no JSON object.")
    return body


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no finite number")


def _steering(body: Mapping[str, Any]) -> tuple[str | None, float]:
    """The name of the recipe and its strength: under `vllm_xargs`, as vLLM wants them, or beside the other keys."""
    inner = body.get("vllm_xargs")
    inner = {} if inner is None else inner
    if not isinstance(inner, dict):
        raise Refused(f"vllm_xargs is {_kind(inner)}, and no object.", parameter="vllm_xargs")
    keys = ("thinksteer", "thinksteer_strength")
    if strange := [key for key in inner if key not in keys]:
        names = ", ".join(key[:60] for key in strange[:20])
        raise Refused(f"vllm_xargs holds {names}. Known: {', '.join(keys)}.", parameter="vllm_xargs")
    found: dict[str, Any] = {}
    for key in keys:
        given = [part[key] for part in (body, inner) if part.get(key) is not None]
        if len(given) == 2 and given[0] != given[1]:
            raise Refused(f"{key} is {_short(given[0])}, but {_short(given[1])} in vllm_xargs.", parameter=key)
        found |= {key: given[0]} if given else {}
    recipe, strength = (found.get(key) for key in keys)
    if recipe is None and strength is not None:
        raise Refused("thinksteer_strength is given, but no recipe: name one, thinksteer.", parameter=keys[1])
    name = None if recipe is None else _text(recipe, keys[0], keys[0])
    return name, 1.0 if strength is None else _number(strength, keys[1])


def _sampling(body: Mapping[str, Any], usual: Sampling) -> Sampling:
    def number(key: str, own: float, high: float) -> float:
        return own if body.get(key) is None else _number(body[key], key, 0.0, high)

    top_p = number("top_p", usual.top_p, 1.0)
    if top_p == 0:
        raise Refused("top_p is 0, but must be above it.", parameter="top_p")
    top_k = usual.top_k if body.get("top_k") is None else max(0, _whole(body["top_k"], "top_k", -1))
    given = body.get("seed")
    seed = secrets.randbelow(2**32) if given is None else _whole(given, "seed", -(2**63), 2**63 - 1)
    temperature, min_p = number("temperature", usual.temperature, math.inf), number("min_p", usual.min_p, 1.0)
    return replace(usual, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    keys = ("max_tokens", "max_completion_tokens")
    given = {key: _whole(body[key], key, 1) for key in keys if body.get(key) is not None}
    if len(set(given.values())) > 1:
        raise Refused("max_tokens and max_completion_tokens differ. Give one of them.", parameter=keys[0])
    return next(iter(given.values()), None)


def _messages(value: object) -> Conversation:
    if not isinstance(value, list) or not value:
        raise Refused(f"messages is {_kind(value)}, but must be a list of at least one message.", parameter="messages")
    return tuple(_message(message, f"messages[{at}]") for at, message in enumerate(value))


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise Refused(f"{where} is {_kind(value)}, and no object of role and content.", parameter="messages")
    known = ("role", "content", "reasoning_content")
    if strange := [key for key in value if key not in known and value[key] not in (None, [])]:
        names = ", ".join(key[:60] for key in strange[:20])
        raise Refused(f"{where} holds {names}. Known: {', '.join(known)}.", parameter="messages")
    parts = value.get("content")
    if isinstance(parts, list):
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or set(part) - {"type", "text"}:
                raise Refused(f"The content of {where} is not all text: no other is read.", parameter="messages")
        parts = "".join(_text(part.get("text"), f"A text of {where}", "messages") for part in parts)
    message = {"role": value.get("role"), "content": parts}
    if value.get("reasoning_content") is not None:  # an earlier turn's, which a template reads or leaves out
        message["reasoning_content"] = value["reasoning_content"]
    return {key: _text(text, f"The {key} of {where}", "messages") for key, text in message.items()}


def _template(value: object) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or any(isinstance(x, dict | list) for x in value.values()):
        raise Refused("chat_template_kwargs must be an object of words and numbers.", parameter="chat_template_kwargs")
    return value


def _usage_in_stream(body: Mapping[str, Any], *, stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or set(options) - {"include_usage", "continuous_usage_stats"}:
        raise Refused("stream_options must be an object. Known: include_usage.", parameter="stream_options")
    if not stream:
        raise Refused("stream_options is given, but the answer is not streamed.", parameter="stream_options")
    if _truth(options, "continuous_usage_stats"):
        raise Refused("continuous_usage_stats is not told here. Known: include_usage.", parameter="stream_options")
    return _truth(options, "include_usage")


def _text(value: object, where: str, parameter: str) -> str:
    if not isinstance(value, str):
        raise Refused(f"{where} is {_kind(value)}, and no text.", parameter=parameter)
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise Refused(f"{where} holds half of a surrogate pair, which is no letter.", parameter=parameter)
    return value


def _truth(body: Mapping[str, Any], key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise Refused(f"{key} is {_kind(value)}, but must be true or false.", parameter=key)
    return bool(value)


def _number(value: object, key: str, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(f"{key} is {_kind(value)}, and no number.", parameter=key)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Refused(f"{key} is {_short(value)}, which is no finite number.", parameter=key)
    if not low <= number <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise Refused(f"{key} is {_short(value)}, but must be {bounds}.", parameter=key)
    return number


def _whole(value: object, key: str, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(f"{key} is {_kind(value)}, and no whole number.", parameter=key)
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise Refused(f"{key} is {_short(value)}, but must be {bounds}.", parameter=key)
    return value


def _kind(value: object) -> str:
    """A JSON value in words."""
    if value is None:
        return "missing"
    names = {bool: "true or false", dict: "an object", list: "a list", str: f"the text {_short(value)}"}
    return names.get(type(value), _short(value))


def _short(value: object) -> str:
    return f"{value!r:.60}"
