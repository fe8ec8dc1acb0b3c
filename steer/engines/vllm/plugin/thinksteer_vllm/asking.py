"""Whether a server steers at all: one without this plugin takes the same requests, and says nothing."""

import json
import urllib.error
import urllib.request

_UNKNOWN = "?"


def probe(url: str, model: str, *, timeout: float = 30.0) -> str | None:
    """What the server at `url` (http://host:port) says of its recipes, and None where it does not steer.

    It is asked for a recipe that no server has: one that steers refuses it, and lists those that it has.
    """
    body = {"model": model, "prompt": "a", "max_tokens": 1, "vllm_xargs": {"thinksteer": _UNKNOWN}}
    request = urllib.request.Request(
        f"{url.rstrip('/')}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return None
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        if error.code != 400 or "recipe" not in text:
            raise
        return str(json.loads(text).get("error", {}).get("message", text))
