"""The ways of vLLM for `steer.engines.parity`: its cache cold and warm, whole prompts and prompts cut into chunks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from probes.generation._batch import end_ids
from probes.model.loading import delimiters_if_any
from steer.engines._parity import Heard, Runner, Way
from steer.engines.vllm.command import missing_for_vllm
from steer.engines.vllm.engine import write_for_vllm
from steer.engines.vllm.job import run_job
from steer.engines.vllm.settings import serving_settings
from steer.recipes.recipe import Recipe

_CHUNK = _BLOCK = 32  # a CPU takes no smaller block


def vllm_ways(*, folder: Path | None = None, **options: Any) -> Mapping[str, Runner]:
    """For `parity(..., more=vllm_ways())`: each in a process of its own; left out where vLLM is not installed.

    The weights are written out for vLLM unless `folder` is where they are. `options` are those of `vllm.LLM`.

    >>> from steer.engines.vllm import vllm_ways
    >>> list(vllm_ways())
    ['vLLM, cold cache', 'vLLM, warm cache', 'vLLM, chunked', 'vLLM, chunked, warm']
    """
    served = _Served(folder, options)
    return {
        "vLLM, cold cache": partial(served.run, 0, False),
        "vLLM, warm cache": partial(served.run, 1, False),
        "vLLM, chunked": partial(served.run, 0, True),
        "vLLM, chunked, warm": partial(served.run, 1, True),
    }


@dataclass(eq=False)
class _Served:
    """What vLLM answered, whole and in chunks, in two rounds each."""

    folder: Path | None
    options: Mapping[str, Any]
    _told: dict[bool, Mapping[str, Any]] = field(default_factory=dict)

    def run(
        self, number: int, chunked: bool, model: PreTrainedModel, recipe: Recipe | None, prompts: Sequence[list[int]],
        n: int,
    ) -> Way:  # fmt: skip
        if lost := missing_for_vllm():
            return Way(left_out=f"{' and '.join(lost)} not installed")
        if chunked not in self._told:
            self._told[chunked] = self._asked(chunked, model, recipe, prompts, n)
        told = self._told[chunked]
        if "refused" in told:
            return Way(left_out=f"refused: {told['refused'][:300]}", failed=True)
        answers = tuple(Heard(own["ids"], own["logprobs"]) for own in told["rounds"][number])
        counts = [sum(row["tokens"] for row in log) for log in told["logs"]]
        touched = counts[number] - (counts[number - 1] if number else 0) if counts else None
        return Way(answers, touched)

    def _asked(
        self, chunked: bool, model: PreTrainedModel, recipe: Recipe | None, prompts: Sequence[list[int]], n: int
    ) -> Mapping[str, Any]:
        own: dict[str, Any] = {
            "dtype": str(model.dtype).partition(".")[2], "max_model_len": max(map(len, prompts)) + n,
            "enforce_eager": True, "skip_tokenizer_init": True, "generation_config": "vllm",
            "enable_prefix_caching": True, "block_size": _BLOCK, "disable_log_stats": True,
        }  # fmt: skip
        if chunked:
            own |= {"enable_chunked_prefill": True, "max_num_batched_tokens": _CHUNK, "max_num_seqs": _CHUNK}
        xargs = None if recipe is None else {"thinksteer": "recipe"}
        more = {"ignore_eos": True, "stop_token_ids": end_ids(model)}
        requests = [{"ids": list(ids), "n": n, "xargs": xargs, "more": more} for ids in prompts]
        with TemporaryDirectory() as name:
            kept = Path(name)
            folder = self.folder or write_for_vllm(model, kept / "model")
            if recipe is not None:
                recipe.save(kept / "recipe")
                own["additional_config"] = serving_settings({"recipe": kept / "recipe"}, delimiters_if_any(model))
            job = {
                "model": str(folder), "engine": {**own, **self.options}, "plugin": recipe is not None,
                "rounds": [requests] * 2,
            }  # fmt: skip
            return run_job(job, kept)
