"""One vLLM engine in a process of its own: `python serve.py JOB RESULT`. A job names a model, settings, and rounds of
requests; the result holds what each request got, what was refused, and what the plugin says of itself."""

import json
import sys
import time
from pathlib import Path


def main(job, result):
    from vllm import LLM, SamplingParams

    begun = time.perf_counter()
    try:
        llm = LLM(job["model"], **job["engine"])
    except Exception as error:  # noqa: BLE001 - what it is refused with is the result
        return {"refused": f"{type(error).__name__}: {error}"}
    result |= {"start": time.perf_counter() - begun, "rounds": [], "logs": [], "bad": []}

    def params(request):
        own = {"temperature": 0.0, "max_tokens": request["n"], "ignore_eos": True, "detokenize": False, "logprobs": 0}
        return SamplingParams(
            **own | {"logit_bias": {0: -100.0}, "extra_args": request["xargs"]} | request.get("more", {})
        )

    for requests in job["rounds"]:
        prompts = [{"prompt_token_ids": request["ids"]} for request in requests]
        outputs = llm.generate(prompts, [params(request) for request in requests], use_tqdm=False)
        result["rounds"].append([written(output.outputs[0], output.num_cached_tokens) for output in outputs])
        if job["plugin"]:
            result["logs"].append(llm.collective_rpc("thinksteer_log")[0])
    for request in job.get("bad", []):
        try:
            llm.generate([{"prompt_token_ids": request["ids"]}], [params(request)], use_tqdm=False)
            result["bad"].append("taken")
        except Exception as error:  # noqa: BLE001
            result["bad"].append(f"{type(error).__name__}: {error}")
    if job["plugin"]:
        result["status"] = llm.collective_rpc("thinksteer_status")[0]
    result["seconds"] = time.perf_counter() - begun
    return result


def written(own, cached):
    logprobs = [step[i].logprob for i, step in zip(own.token_ids, own.logprobs, strict=True)]
    return {"ids": list(own.token_ids), "logprobs": logprobs, "cached": cached}


if __name__ == "__main__":
    told = main(json.loads(Path(sys.argv[1]).read_text()), {})
    Path(sys.argv[2]).write_text(json.dumps(told))
