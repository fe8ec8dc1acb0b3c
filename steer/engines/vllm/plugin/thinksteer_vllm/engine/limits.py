"""What an engine must not be, to be steered: each with a sentence, said before it comes up."""

from typing import Any

from thinksteer_vllm.refusal import Refused
from thinksteer_vllm.settings import Settings

_HEADS = ("z", "result")


def check_engine(config: Any, settings: Settings) -> None:
    """Raise Refused where the engine does what recipes cannot follow."""
    sites = {step.site for recipe in settings.recipes.values() for step in recipe.steps}
    faults = {**_split(config, sites), **_foreign(config), **_kept(config, sites, settings.sealed)}
    said = [sentence for sentence, holds in faults.items() if holds]
    if said:
        raise Refused(f"thinksteer cannot steer this engine: {'; '.join(said)}.")


def _split(config: Any, sites: set[str]) -> dict[str, bool]:
    """A model or a pass in parts."""
    parallel, passes = config.parallel_config, config.compilation_config.pass_config
    tensor_parallel = parallel.tensor_parallel_size > 1
    return {
        "pipeline parallelism splits the layers, and later ranks see no token ids: set pipeline_parallel_size=1": (
            parallel.pipeline_parallel_size > 1
        ),
        "with tensor parallelism no rank has all heads: leave recipes for z and result out, or use one GPU": (
            tensor_parallel and bool(sites & set(_HEADS))
        ),
        "sequence parallelism and fused all-reduce cut or fold the stream where it is edited: switch enable_sp and "
        "fuse_allreduce_rms off in pass_config": (
            tensor_parallel and (bool(getattr(passes, "enable_sp", False)) or bool(passes.fuse_allreduce_rms))
        ),
        "context parallelism splits a request's tokens over ranks: leave it out": (
            parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1
        ),
        "micro-batches (ubatch_size, enable_dbo) run parts of a pass beside each other: leave them out": (
            parallel.enable_dbo or parallel.ubatch_size > 1
        ),
    }


def _foreign(config: Any) -> dict[str, bool]:
    """Tokens or layers that are not those of one plain model."""
    return {
        "speculative decoding drafts tokens without steering, and takes some back: leave speculative_config out": (
            config.speculative_config is not None
        ),
        "it was written for CPUs and GPUs (cuda), and another device's runner would not steer: use those": (
            config.device_config.device_type not in ("cpu", "cuda")
        ),
        "LoRA wraps the layers that are edited, and is not tested: leave it out": config.lora_config is not None,
        "diffusion models do not write token by token: serve them without recipes": config.diffusion_config is not None,
        "a pooling model writes no tokens: serve it without recipes": config.model_config.runner_type != "generate",
        "an encoder-decoder model has two clocks: serve it without recipes": config.model_config.is_encoder_decoder,
        "its loader (tensorizer, modelexpress) goes past the place where recipes are attached: take another": (
            config.load_config.load_format in ("tensorizer", "modelexpress")
        ),
    }


def _kept(config: Any, sites: set[str], sealed: bool) -> dict[str, bool]:
    """What was computed or written elsewhere or before."""
    mode = config.compilation_config.mode
    return {
        "what a KV connector brings or offloads may have been steered by another recipe: leave kv_transfer_config and "
        "kv_offloading_size out": (
            config.kv_transfer_config is not None or config.cache_config.kv_offloading_size is not None
        ),
        "a head's result cannot be told from quantised weights: leave recipes for result out": (
            config.quant_config is not None and "result" in sites
        ),
        "compiled graphs are kept, and the settings do not tell whether recipes changed since: give `fingerprints` of "
        "all recipes and `version`, as steer.engines.vllm.serving_settings writes them, or set enforce_eager": (
            mode is not None and int(mode) != 0 and not sealed
        ),
    }


def facts_of(config: Any) -> dict[str, Any]:
    """What a recipe's own notes of its model are compared with. Weights are fused here, so they cannot be."""
    text = config.model_config.hf_text_config
    return {"model_type": text.model_type, "n_layers": text.num_hidden_layers, "d_model": text.hidden_size}
