"""How a worker gets its steering, and how either of vLLM's runners fills it before each real pass.

The first runner (V1) was run in tests, on a CPU. The second (V2), which is that of GPUs, was NOT RUN: it was written
after its source, and its parts are tested with batches made by hand.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from thinksteer_vllm.engine import op
from thinksteer_vllm.engine.attach import attach, blocks_of, sizes_of
from thinksteer_vllm.engine.limits import check_engine, facts_of
from thinksteer_vllm.refusal import Refused
from thinksteer_vllm.settings import settings_of
from thinksteer_vllm.steering import Asked, Share, Steering

log = logging.getLogger("vllm.thinksteer")  # other names are not shown
HOOKS: Mapping[str, tuple[str, ...]] = {  # of a ModelState of V2, with what they are given
    "add_request": ("req_index", "new_req_data"),
    "remove_request": ("req_id",),
    "preprocess_state": ("input_batch",),
}


def begin(model: nn.Module, config: Any) -> None:
    """Steering for a model that was just loaded. Nothing where the server was started without recipes."""
    settings = settings_of(config)
    if settings is None:
        return
    if op.held() is not None:
        raise Refused("A second model is loaded in this process, and thinksteer steers one. Serve it by itself.")
    check_engine(config, settings)
    blocks = blocks_of(model)
    widths, n_heads = sizes_of(blocks)
    for recipe in settings.recipes.values():
        recipe.check(facts_of(config), n_heads, widths["head"])
    steering = Steering(
        settings,
        widths,
        dtype=config.model_config.dtype,
        device=next(model.parameters()).device,
        n_tokens=_most_tokens(config),
        n_requests=config.scheduler_config.max_num_seqs,
    )
    attach(blocks, steering)
    op.hold(steering)
    if config.use_v2_model_runner:
        _take_second(model, config)
    log.info("thinksteer steers with the recipes %s.", ", ".join(settings.recipes))


def fill_first(steering: Steering, runner: Any) -> None:
    """V1, whose batch holds what the host knows of each request's ids."""
    steering.forget(runner.requests.__contains__)
    batch, starts = runner.input_batch, runner.query_start_loc.np
    shares = []
    for i, name in enumerate(batch.req_ids):
        request = runner.requests[name]
        extra = None if request.sampling_params is None else request.sampling_params.extra_args
        asked = steering.asked(extra, request.prompt_token_ids)
        if asked is not None:
            ids = batch.token_ids_cpu[i]
            begin_at = int(batch.num_computed_tokens_cpu[i])
            shares.append(Share(name, asked, int(starts[i]), int(starts[i + 1]), begin_at, lambda n, ids=ids: ids[:n]))
    steering.fill(shares, runner.input_ids.gpu)


def second_class(base: type, steering: Steering) -> type:
    """V2: the state of a model's requests, which is told of each, and of each real pass before it runs."""

    def __init__(self: Any, *args: Any, **named: Any) -> None:
        base.__init__(self, *args, **named)
        self.thinksteer = {}

    def add_request(self: Any, req_index: int, new_req_data: Any) -> None:
        base.add_request(self, req_index, new_req_data)
        extra = None if new_req_data.sampling_params is None else new_req_data.sampling_params.extra_args
        asked = steering.asked(extra, new_req_data.prompt_token_ids)
        if asked is not None:
            self.thinksteer[new_req_data.req_id] = asked, list(new_req_data.prefill_token_ids or asked.prompt)

    def remove_request(self: Any, req_id: str) -> None:
        base.remove_request(self, req_id)
        self.thinksteer.pop(req_id, None)

    def preprocess_state(self: Any, input_batch: Any, *args: Any, **named: Any) -> None:
        base.preprocess_state(self, input_batch, *args, **named)
        steering.forget(self.thinksteer.__contains__)
        steering.fill(list(shares_of(input_batch, self.thinksteer)), input_batch.input_ids)

    check_hooks(base)
    methods = (__init__, add_request, remove_request, preprocess_state)
    return type(f"Steered{base.__name__}", (base,), {method.__name__: method for method in methods})


def check_hooks(base: type) -> None:
    """Raise Refused where V2 does not tell what we need to hear."""
    lost = [name for name, given in HOOKS.items() if not _hears(getattr(base, name, None), given)]
    if lost:
        raise Refused(
            f"This vLLM's {base.__name__} has no {', '.join(lost)} as thinksteer-vllm knows them. "
            "Set VLLM_USE_V2_MODEL_RUNNER=0, or install a newer thinksteer-vllm."
        )


def shares_of(batch: Any, requests: dict[str, tuple[Asked, list[int]]]) -> Iterator[Share]:
    """Of a batch of V2, those of the steered requests. The host knows what they were added with; the rest follows."""
    starts = batch.query_start_loc_np
    for i, name in enumerate(batch.req_ids):
        if name in requests:
            asked, ids = requests[name]
            start, stop = int(starts[i]), int(starts[i + 1])
            yield Share(name, asked, start, stop, int(batch.num_computed_tokens_np[i]), lambda n, ids=ids: ids[:n])


def _take_second(model: nn.Module, config: Any) -> None:
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

    steering = op.held()
    assert steering is not None
    made = second_class(resolve_model_state_cls(config, model), steering)
    model.get_model_state_cls = lambda: made  # type: ignore[assignment]


def _hears(method: Any, given: tuple[str, ...]) -> bool:
    return method is not None and set(given) <= set(inspect.signature(method).parameters)


def _most_tokens(config: Any) -> int:
    """Of a pass, with what fills it up to the sizes that were captured."""
    captured = config.compilation_config.cudagraph_capture_sizes or [0]
    return max(config.scheduler_config.max_num_batched_tokens, *captured) + 512
