"""One vLLM in a process of its own: `python -m steer.engines.vllm.job JOB RESULT`, both JSON.

A job names a model, settings of `vllm.LLM`, and rounds of requests; the result holds what each request got, what was
refused, and what the plugin says of itself. A process has one vLLM, and what a start leaves behind ends with it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PER_ROUND = ("rounds", "logs", "seconds", "cpu_seconds")


def run_job(job: Mapping[str, Any], folder: Path, *, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A job done in another process. Raises RuntimeError, with the last of what it said, where that fails."""
    given, result = folder / "job.json", folder / "result.json"
    given.write_text(json.dumps(job), encoding="utf-8")
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **os.environ, **(env or {})}
    command = [sys.executable, "-m", __name__, str(given), str(result)]
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"vLLM ended with {done.returncode}: {done.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return told


def do(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job, in this process."""
    from vllm import LLM

    begun = time.perf_counter()
    try:
        llm = LLM(job["model"], **job["engine"])
    except Exception as error:  # noqa: BLE001 - what it is refused with is the result
        return {"refused": f"{type(error).__name__}: {error}"}
    told: dict[str, Any] = {"start": time.perf_counter() - begun} | {key: [] for key in _PER_ROUND} | {"bad": []}
    for requests in job["rounds"]:
        begun, spent = time.perf_counter(), time.process_time()
        outputs = llm.generate(_prompts(requests), [_params(request) for request in requests], use_tqdm=False)
        told["seconds"].append(time.perf_counter() - begun)
        told["cpu_seconds"].append(time.process_time() - spent)
        told["rounds"].append([_written(output.outputs[0], output.num_cached_tokens) for output in outputs])
        if job["plugin"]:
            told["logs"].append(llm.collective_rpc("thinksteer_log")[0])
    for request in job.get("bad", []):
        try:
            llm.generate(_prompts([request]), [_params(request)], use_tqdm=False)
            told["bad"].append("taken")
        except Exception as error:  # noqa: BLE001
            told["bad"].append(f"{type(error).__name__}: {error}")
    if job["plugin"]:
        told["status"] = llm.collective_rpc("thinksteer_status")[0]
    return told


def _prompts(requests: list[dict[str, Any]]) -> Any:
    return [{"prompt_token_ids": request["ids"]} for request in requests]


def _params(request: Mapping[str, Any]) -> Any:
    from vllm import SamplingParams

    own = {"temperature": 0.0, "max_tokens": request["n"], "ignore_eos": True, "detokenize": False, "logprobs": 0}
    more = dict(request.get("more", {}))
    if "logit_bias" in more:  # JSON has no numbers as keys
        more["logit_bias"] = {int(token): bias for token, bias in more["logit_bias"].items()}
    return SamplingParams(**own | {"extra_args": request["xargs"]} | more)


def _written(own: Any, cached: int) -> dict[str, Any]:
    logprobs = [step[token].logprob for token, step in zip(own.token_ids, own.logprobs, strict=True)]
    return {"ids": list(own.token_ids), "logprobs": logprobs, "cached": cached}


if __name__ == "__main__":
    told = do(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(told), encoding="utf-8")
