"""How vLLM's server is started beside its plugin: what is on its command line, in its environment, in its file."""

import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

MODULE = "vllm.entrypoints.openai.api_server"  # the command `vllm` is missing in some builds
ENTRY, GROUP = "thinksteer", "vllm.endpoint_plugins"
# What `steer serve` says to vLLM itself, each with what to give in its place.
_OURS: Mapping[str, str] = {
    "--model": "name it as MODEL",
    "--served-model-name": "it is what MODEL says",
    "--host": "give --host before the --",
    "--port": "give --port before the --",
    "--uds": "give --host and --port before the --",
    "--api-key": "give --api-key before the --, or THINKSTEER_API_KEY",
    "--additional-config": "give --recipe before the --",
    "--config": "give its options one by one",
    "--headless": "it would answer nobody",
    "--root-path": "put the path in front of it in a proxy",
    "--ssl-keyfile": "put a proxy in front of it",
    "--ssl-certfile": "put a proxy in front of it",
}


def missing_for_vllm() -> list[str]:
    """The packages that a vLLM server with recipes needs, and that are not installed.

    >>> from steer.engines.vllm import missing_for_vllm
    >>> set(missing_for_vllm()) <= {"vllm", "thinksteer-vllm"}
    True
    """
    own = importlib.metadata.entry_points(group=GROUP)
    plugged = find_spec("thinksteer_vllm") is not None and ENTRY in own.names
    return [
        name for name, there in (("vllm", find_spec("vllm") is not None), ("thinksteer-vllm", plugged)) if not there
    ]


def check_vllm() -> None:
    """Raise ImportError where a package is missing, or the plugin is older than its addresses.

    >>> from steer.engines.vllm import check_vllm
    >>> try:
    ...     check_vllm()
    ... except ImportError as error:
    ...     told = str(error)  # --engine vllm needs vllm and thinksteer-vllm: pip install vllm==0.32.0, then ...
    """
    if lost := missing_for_vllm():
        raise ImportError(
            f"--engine vllm needs {' and '.join(lost)}: pip install vllm==0.32.0, then pip install "
            "./steer/engines/vllm/plugin out of ThinkSteer's repository; or take --engine transformers."
        )


def check_options(options: Sequence[str]) -> None:
    """Raise ValueError for options of vLLM that `steer serve` gives it itself.

    >>> from steer.engines.vllm import check_options
    >>> check_options(["--max-model-len", "4096"])
    >>> check_options(["--port=9000"])
    Traceback (most recent call last):
        ...
    ValueError: --port is not for vLLM's options: give --port before the --.
    """
    for word in options:
        if (name := _name(word)) in _OURS:
            raise ValueError(f"{word.partition('=')[0]} is not for vLLM's options: {_OURS[name]}.")
    if options and not options[0].startswith("-"):
        raise ValueError(
            f"{options[0]!r} is no option of vLLM: give options behind a --, such as -- --max-model-len 4096."
        )


def dtype_of(options: Sequence[str]) -> str | None:
    """What vLLM's own options say of the dtype."""
    found = None
    for word, following in zip_longest(options, options[1:]):
        if _name(word) == "--dtype":
            found = word.partition("=")[2] or following
    return {"float": "float32", "half": "float16"}.get(str(found), found)


def command_of(config: Path, options: Sequence[str]) -> list[str]:
    """The user's options, behind those of the file, which are `settings_file`'s."""
    return [sys.executable, "-m", MODULE, "--config", str(config), *options]


def settings_file(
    path: Path,
    *,
    source: str,
    name: str,
    host: str,
    port: int,
    dtype: str,
    settings: Mapping[str, Any],
    max_batch: int | None,
) -> Path:
    """Options of vLLM in a file: a list of delimiters may be longer than a command line can be."""
    words: dict[str, Any] = {"model": source, "served-model-name": name, "host": host, "port": port, "dtype": dtype}
    words |= {} if max_batch is None else {"max-num-seqs": max_batch}
    words |= {"additional-config": json.dumps(settings)} if settings else {}
    path.write_text(json.dumps(words), encoding="utf-8")  # which is YAML
    return path


def environment_of(api_key: str | None, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The key, which others could read on a command line; and the plugins, ours among them.

    The addresses of a plugin are only opened where VLLM_PLUGINS names it. What it leaves out is not loaded: so where
    the user has not set it, all those are named that vLLM would have loaded.
    """
    own = dict(given)
    if api_key is not None:
        own["VLLM_API_KEY"] = api_key
    named = own.get("VLLM_PLUGINS")
    names = _installed() if named is None else [name.strip() for name in named.split(",") if name.strip()]
    own["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, ENTRY]))
    return own


def _installed() -> list[str]:
    groups = (f"vllm.{kind}_plugins" for kind in ("general", "platform", "io_processor", "stat_logger"))
    return [entry.name for group in groups for entry in importlib.metadata.entry_points(group=group)]


def _name(word: str) -> str:
    """An option without its value or its part, in the spelling of the table."""
    return word.partition("=")[0].partition(".")[0].replace("_", "-") if word.startswith("--") else word
