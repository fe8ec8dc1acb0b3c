"""The few methods of vLLM that are wrapped, checked by name and parameters before they are.

They are internal to vLLM, so a version where one is missing refuses to serve recipes, and serves as ever without.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from thinksteer_vllm.engine import op
from thinksteer_vllm.engine.admission import admitting, gathering, noting, without_beams
from thinksteer_vllm.refusal import Refused
from thinksteer_vllm.settings import settings_of

TESTED = "0.32"


@dataclass(frozen=True)
class Patch:
    """A method, the parameters it must have, and what goes around it."""

    module: str
    owner: str
    method: str
    parameters: tuple[str, ...]
    around: Callable[[Callable[..., Any]], Callable[..., Any]]

    def __str__(self) -> str:
        return f"{self.module}.{self.owner}.{self.method}"


def install() -> None:
    """Once a process, however often it is called."""
    for patch in PATCHES:
        if _fits(patch):
            owner = getattr(importlib.import_module(patch.module), patch.owner)
            original = getattr(owner, patch.method)
            if not getattr(original, "thinksteer", False):
                wrapped: Any = functools.wraps(original)(patch.around(original))
                wrapped.thinksteer = True
                setattr(owner, patch.method, wrapped)
    _offer()


def check_patches() -> None:
    """Raise Refused where a method was not found that must be wrapped."""
    faults = [str(patch) for patch in PATCHES if not _fits(patch)]
    if faults:
        raise Refused(
            f"This vLLM has no {', '.join(faults)} as thinksteer-vllm knows them: it was tested with vLLM {TESTED}. "
            "Install that, or a newer thinksteer-vllm."
        )


def _fits(patch: Patch) -> bool:
    try:
        owner = getattr(importlib.import_module(patch.module), patch.owner)
        known = inspect.signature(getattr(owner, patch.method)).parameters
    except (ImportError, AttributeError):
        return False
    return set(patch.parameters) <= set(known)


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        from thinksteer_vllm.engine.runners import begin

        if settings_of(vllm_config) is not None:
            check_patches()
        model = original(self, vllm_config, model_config, prefix)
        begin(model, vllm_config)
        return model

    return load_model


def _running(original: Callable[..., Any]) -> Callable[..., Any]:
    def _model_forward(self: Any, *args: Any, **named: Any) -> Any:
        from thinksteer_vllm.engine.runners import fill_first

        steering = op.held()
        if steering is not None:
            fill_first(steering, self)
        return original(self, *args, **named)

    return _model_forward


def _offer() -> None:
    """Two methods that a worker can be asked by name: `collective_rpc("thinksteer_log")`, and `_status`."""
    from vllm.v1.worker.worker_base import WorkerBase

    worker: Any = WorkerBase
    worker.thinksteer_log = lambda _: [] if (steering := op.held()) is None else steering.log()
    worker.thinksteer_status = lambda _: {"steering": False} if (own := op.held()) is None else own.status()


PATCHES = (
    Patch("vllm.model_executor.model_loader.base_loader", "BaseModelLoader", "load_model",
          ("self", "vllm_config", "model_config", "prefix"), _loading),
    Patch("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_model_forward",
          ("self", "input_ids", "positions", "inputs_embeds"), _running),
    Patch("vllm.v1.engine.input_processor", "InputProcessor", "__init__", ("self", "vllm_config"), noting),
    Patch("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs",
          ("self", "request_id", "prompt", "params", "resumable", "lora_request"), admitting),
    *(Patch(f"vllm.entrypoints.openai.{kind}.protocol", owner, method, ("self", "max_tokens"), around)
      for kind, owner in (("chat_completion", "ChatCompletionRequest"), ("completion", "CompletionRequest"))
      for method, around in (("to_beam_search_params", without_beams), ("to_sampling_params", gathering))),
)  # fmt: skip
