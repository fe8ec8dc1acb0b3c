"""What the front end lets in: a request that cannot be steered is refused with a 400, and one that can gets a salt.

The keys and values of a steered prefix depend on its recipe, on its strength and, where a scope is about phases, on
where the last header of the prompt ends. The salt holds these, so that no other request takes its blocks.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from thinksteer_vllm.machine import last_header
from thinksteer_vllm.settings import ADMITTED, KEY, STRENGTH, Settings, settings_of

Refusal = Callable[[str], Exception]
LARGEST = 3.4e38  # of float32
_SERVED: dict[str, Settings | None] = {}  # what this process lets requests in for


def refusal(text: str) -> Exception:
    """An error of the client's, which vLLM answers with a 400 and this text."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(text, parameter="vllm_xargs")


def read_wish(extra: Mapping[str, Any] | None, settings: Settings | None, refuse: Refusal) -> tuple[str, float] | None:
    """The recipe and the strength that a request asks for; None where it asks for none."""
    wish = {key: value for key, value in (extra or {}).items() if key.startswith(KEY)}
    if not wish:
        return None
    known = ", ".join(settings.recipes) if settings is not None else ""
    if unknown := sorted(set(wish) - {KEY, STRENGTH}):
        raise refuse(f"{', '.join(unknown)} is not known to thinksteer. Known: {KEY} (a recipe), {STRENGTH}.")
    if settings is None:
        raise refuse(
            f"This server was started without recipes. Start it with --additional-config '{{\"{KEY}\": ...}}'."
        )
    name, strength = wish.get(KEY), wish.get(STRENGTH, 1.0)
    if not isinstance(name, str) or name not in settings.recipes:
        raise refuse(f"There is no recipe {name!r}. This server has the recipes: {known}.")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise refuse(f"{STRENGTH} is a finite number that multiplies all strengths, but got {strength!r}.")
    if any(abs(strength) * max(1.0, abs(step.strength)) > LARGEST for step in settings.recipes[name].steps):
        raise refuse(f"{STRENGTH} is {strength:g}: times the strengths of {name!r} it is beyond float32.")
    return name, float(strength)


def check_request(params: Any, arguments: Mapping[str, Any], refuse: Refusal) -> None:
    """What is told before the prompt is read."""
    if getattr(params, "thinking_token_budget", None) is not None:
        raise refuse("A recipe together with thinking_token_budget is not tested: give one of the two.")
    if getattr(params, "trace_decode_token_ids", None):
        raise refuse("A recipe cannot follow a replayed trace: leave trace_decode_token_ids out.")
    if arguments.get("resumable"):
        raise refuse("A recipe cannot follow a prompt that goes on streaming in: send it whole.")
    if arguments.get("lora_request") is not None:
        raise refuse("A recipe together with LoRA is not tested: give one of the two.")


def salted(request: Any, recipe: str, strength: float, settings: Settings, refuse: Refusal) -> None:
    """The salt of a request whose prompt was read; refused where that is not token ids alone."""
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        raise refuse("A recipe reads token ids, but the prompt came as embeddings: send text or ids.")
    if request.mm_features:
        raise refuse("A recipe reads token ids, but the prompt holds images, sound or video: send text alone.")
    if getattr(request, "pooling_params", None) is not None:
        raise refuse("A recipe changes what is written, but this request asks for no text.")
    own = settings.recipes[recipe]
    at = last_header(settings.machine, request.prompt_token_ids) if own.by_phase else None
    words = "\n".join(map(repr, (own.fingerprint, strength, at, request.cache_salt)))
    params = request.sampling_params
    params.extra_args = {**params.extra_args, ADMITTED: True}  # a worker takes no other
    request.cache_salt = f"thinksteer-{hashlib.sha256(words.encode()).hexdigest()[:48]}"


def noting(original: Callable[..., Any]) -> Callable[..., Any]:
    """`InputProcessor.__init__`: from here on this process knows what it serves."""

    def __init__(self: Any, vllm_config: Any, *args: Any, **named: Any) -> None:
        _SERVED["settings"] = settings_of(vllm_config)
        original(self, vllm_config, *args, **named)

    return __init__


def admitting(original: Callable[..., Any]) -> Callable[..., Any]:
    """`InputProcessor.process_inputs`, which lets a request in, behind these checks."""
    signature = inspect.signature(original)

    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **named: Any) -> Any:
        settings = settings_of(self.vllm_config)
        wish = read_wish(getattr(params, "extra_args", None), settings, refusal)
        if wish is None or settings is None:
            return original(self, request_id, prompt, params, *args, **named)
        given = signature.bind(self, request_id, prompt, params, *args, **named).arguments
        check_request(params, given, refusal)
        request = original(self, request_id, prompt, params, *args, **named)
        salted(request, *wish, settings, refusal)
        return request

    return process_inputs


def without_beams(original: Callable[..., Any]) -> Callable[..., Any]:
    """`to_beam_search_params` of a request, which would drop what it asks of us."""

    def to_beam_search_params(self: Any, *args: Any, **named: Any) -> Any:
        if any(key.startswith(KEY) for key in gathered(self, refusal)):
            raise refusal("A recipe cannot follow beam search, which swaps rows between steps: use sampling.")
        return original(self, *args, **named)

    return to_beam_search_params


def gathering(original: Callable[..., Any]) -> Callable[..., Any]:
    """`to_sampling_params` of a request, which would not read keys that stand beside the others.

    A wish that cannot be granted is refused here already: later a stream would have begun, with the status 200.
    """

    def to_sampling_params(self: Any, *args: Any, **named: Any) -> Any:
        found = gathered(self, refusal)
        if found != (self.vllm_xargs or {}):
            self.vllm_xargs = found
        if "settings" in _SERVED:
            read_wish(found, _SERVED["settings"], refusal)
        return original(self, *args, **named)

    return to_sampling_params


def gathered(request: Any, refuse: Refusal) -> dict[str, Any]:
    """What a body says to plugins: its `vllm_xargs`, with our keys that stand beside the others."""
    inner, beside = dict(request.vllm_xargs or {}), getattr(request, "model_extra", None) or {}
    for key, value in beside.items():
        if key.startswith(KEY) and value is not None and inner.setdefault(key, value) != value:
            raise refuse(f"{key} is {value!r}, but {inner[key]!r} in vllm_xargs: give one of them.")
    return inner
