"""The keys of a request's body: those that are read, those that change no answer, and values that ask for nothing."""

from collections.abc import Mapping
from typing import Any

from steer.engines.serving.tickets import Refused

SHARED = (
    "model", "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stream", "stream_options",
    "return_token_ids", "vllm_xargs", "thinksteer", "thinksteer_strength",
)  # fmt: skip
CHAT = (*SHARED, "messages", "max_completion_tokens", "chat_template_kwargs")
TEXT = (*SHARED, "prompt")
# What an answer does not depend on.
IDLE = ("user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier", "request_id", "priority")
# What would change the answer, or ask for more of it, and is not done: each with the values that ask for nothing.
OFF: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "use_beam_search": (False,), "stop": ([], ""), "stop_token_ids": ([],),
    "logprobs": (False,), "top_logprobs": (0,), "prompt_logprobs": (), "logit_bias": ({},), "echo": (False,),
    "suffix": ("",), "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,),
    "length_penalty": (1,), "min_tokens": (0,), "ignore_eos": (False,), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "include_reasoning": (True,), "separate_reasoning": (True,),
}  # fmt: skip
_WHY = {
    "n": "n is {}, but a request gets one answer: ask again with another seed.",
    "best_of": "best_of is {}, but a request gets one answer: ask again with another seed.",
    "use_beam_search": "Beam search is not done here: tokens are drawn one by one.",
    "stop": "stop is not done here: an answer ends where the model ends it, or at max_tokens.",
    "logprobs": "logprobs are not told here.",
}


def check_keys(body: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raises Refused for keys that would change the answer, and are not read."""
    for key, sentence in _WHY.items():
        if key in body and not _asks_nothing(key, body[key]):
            raise Refused(sentence.format(_short(body[key])), parameter=key)
    strange = [key for key in body if key not in (*known, *IDLE) and not _asks_nothing(key, body[key])]
    if strange:
        one = len(strange) == 1
        raise Refused(
            f"{', '.join(key[:60] for key in strange[:20])} {'is' if one else 'are'} not known here, and would change "
            f"the answer or be left out in silence. Known: {', '.join(known)}.",
            parameter=strange[0][:60],
        )


def _asks_nothing(key: str, value: object) -> bool:
    if key not in OFF:
        return False
    return value is None or any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in OFF[key])


def _short(value: object) -> str:
    return f"{value!r:.60}"
