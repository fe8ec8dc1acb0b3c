"""vLLM as an engine of `generate` and `evaluate`: the same rows, draws and recipes, in its own passes."""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from probes.generation._batch import end_ids
from probes.generation.engine import Row, Written
from probes.generation.sampling import Decoding, ListeningRun, Sampling
from probes.generation.settings import honoured
from probes.model.architectures import config_of
from probes.model.loading import delimiters_if_any, fingerprint, origin_of, tokenizer_of
from probes.model.passes import edits_of, tell_touched
from steer.checkpoints.writing import write_model
from steer.decoding.control import Controlled
from steer.decoding.state import DecodingState
from steer.engines.vllm.command import missing_for_vllm
from steer.engines.vllm.deciding import ROW, TABLE, Decider, processor_class
from steer.engines.vllm.settings import serving_settings
from steer.recipes.recipe import Recipe

USUAL: Mapping[str, Any] = {
    "skip_tokenizer_init": True, "generation_config": "vllm", "enable_chunked_prefill": False,
    "async_scheduling": False, "enforce_eager": True, "max_num_seqs": 64, "disable_log_stats": True,
}  # fmt: skip


class VLLM:
    """vLLM in this process, with the recipes that arms may apply: `engine=VLLM(model, {"shorter": recipe})`.

    `model`, as transformers has it, tells tokens and delimiters; its weights are written out for vLLM unless `folder`
    is where they are. `options` are those of `vllm.LLM`. A row is drawn as transformers draws it, by prompt, sample and
    seed, and decided by the same controls; what differs is the last bits of vLLM's own arithmetic. One at a time in a
    process; `close` it, or use it as a context. Raises ImportError where vLLM or its plugin is not installed, and
    ValueError for a recipe that does not run there.

    >>> import torch
    >>> from probes import Site, generate, load
    >>> from steer import Add, Recipe, applied
    >>> from steer.engines.vllm import VLLM
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Add(Site(2, "resid_post"), torch.ones(96), 0.05)])
    >>> try:
    ...     with VLLM(model, {"shorter": recipe}) as engine, applied(model, recipe, must_run=False):
    ...         completions = generate(model, ["a 3 b +4"], engine=engine)
    ... except (ImportError, ValueError) as error:
    ...     told = str(error)  # vllm and thinksteer-vllm are not installed ...
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipes: Mapping[str, Recipe] | None = None,
        *,
        folder: Path | None = None,
        **options: Any,
    ) -> None:
        recipes = dict(recipes or {})
        for recipe in recipes.values():
            recipe.check(model)
        self.recipes = {recipe.fingerprint(): name for name, recipe in recipes.items()}
        check_installed()
        self.fingerprint = fingerprint(model)
        self._steered = bool(recipes)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # rows are decided by our own objects, in this process
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the other takes logits processors of another kind
        from vllm import __version__

        self._version = __version__
        with TemporaryDirectory() as kept:
            own = {**USUAL, "dtype": str(model.dtype).partition(".")[2], **options}
            own.setdefault("max_model_len", getattr(config_of(model), "max_position_embeddings", None))
            self.llm = _started(model, recipes, Path(kept), folder, own)

    @property
    def name(self) -> str:
        """As a store keeps it."""
        return f"vllm {self._version}"

    def check(self, model: PreTrainedModel, sampling: Sampling, decoding: Decoding | None) -> None:  # noqa: ARG002
        """Raise ValueError for another model, a recipe that was not named, or a control that reads the passes."""
        if fingerprint(model) != self.fingerprint:
            raise ValueError(
                f"The engine holds other weights than {origin_of(model).name!r} has now. Start one with this model."
            )
        self._recipe(model)
        if strange := sorted(set(honoured(model)) - {"repetition_penalty"}):
            raise ValueError(
                f"The model's generation config sets {', '.join(strange)}, which vLLM does not do as transformers "
                "does. Unset it, or generate with transformers."
            )
        if decoding is not None and _reads(decoding):
            raise ValueError(f"{decoding.name} reads the model's passes, which run inside vLLM: use transformers.")

    def write(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        sampling: Sampling,
        decoding: Decoding | None,
        *,
        batch_size: int,
        run: object,  # noqa: ARG002
    ) -> Iterator[list[Written]]:
        """The rows as they end, at most `batch_size` side by side."""
        own = model.generation_config
        penalty = 1.0 if own is None or own.repetition_penalty is None else float(own.repetition_penalty)
        recipe, before = self._recipe(model), self._touched()
        decider = Decider(sampling, decoding, penalty)
        TABLE.decider, TABLE.rows = decider, {row.number: row for row in rows}
        waiting, live, engine = deque(rows), dict[str, Row](), self.llm.llm_engine
        try:
            while waiting or live:
                while waiting and len(live) < batch_size:
                    row = waiting.popleft()
                    live[str(row.number)] = row
                    asked = self._params(model, row, sampling, recipe)
                    engine.add_request(str(row.number), {"prompt_token_ids": list(row.prompt)}, asked)
                ended = [out for out in engine.step() if out.finished]
                new = [(live.pop(out.request_id), list(out.outputs[0].token_ids)) for out in ended]
                if new:
                    decider.check()
                    yield [Written(row, ids, decider.events(row)) for row, ids in new]
        finally:
            if live:
                engine.abort_request(list(live))
            TABLE.decider, TABLE.rows = None, {}
        for edit in edits_of(model):
            tell_touched(model, str(edit), self._touched().get(recipe, 0) - before.get(recipe, 0))

    def fired(self) -> list[dict[str, Any]]:
        """By recipe, step and phase: the tokens that were touched since the start, each once."""
        rows: list[dict[str, Any]] = self.llm.collective_rpc("thinksteer_log")[0] if self._steered else []
        return rows

    def close(self) -> None:
        """Give up what vLLM holds."""
        self.llm.llm_engine.engine_core.shutdown()

    def __enter__(self) -> "VLLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _touched(self) -> dict[str | None, int]:
        counts: dict[str | None, int] = {}
        for row in self.fired():
            counts[row["recipe"]] = counts.get(row["recipe"], 0) + row["tokens"]
        return counts

    def _recipe(self, model: PreTrainedModel) -> str | None:
        """The name of the recipe that is applied to the model now."""
        edits = edits_of(model)
        if not edits:
            return None
        if len(edits) > 1 or edits[0] not in self.recipes:
            known = ", ".join(self.recipes.values()) or "none"
            raise ValueError(
                f"{len(edits)} edit(s) are attached to the model, and vLLM runs one recipe that it was started with. "
                f"Known: {known}. Name it when the engine is made, VLLM(model, {{name: recipe}})."
            )
        return self.recipes[edits[0]]

    def _params(self, model: PreTrainedModel, row: Row, sampling: Sampling, recipe: str | None) -> Any:
        from vllm import SamplingParams

        extra: dict[str, Any] = {ROW: row.number} | ({} if recipe is None else {"thinksteer": recipe})
        return SamplingParams(
            temperature=0.0,
            max_tokens=row.limit(sampling),
            stop_token_ids=end_ids(model),
            ignore_eos=True,  # the ends are those above
            detokenize=False,
            extra_args=extra,
        )


def check_installed() -> None:
    """Raise ImportError where vLLM or its plugin is missing."""
    if lost := missing_for_vllm():
        raise ImportError(
            f"{' and '.join(lost)} {'is' if len(lost) == 1 else 'are'} not installed: pip install vllm==0.32.0 "
            "./steer/engines/vllm/plugin, in an environment of its own, or generate with transformers."
        )


def write_for_vllm(model: PreTrainedModel, folder: Path) -> Path:
    """The weights as they are now, and the tokenizer."""
    write_model(model, folder)
    tokenizer_of(model).save_pretrained(folder)
    return folder


def _started(
    model: PreTrainedModel, recipes: Mapping[str, Recipe], kept: Path, folder: Path | None, options: dict[str, Any]
) -> Any:
    """vLLM, once it has read the weights and the recipes."""
    from vllm import LLM

    if folder is None:
        folder = write_for_vllm(model, kept / "model")
    for number, recipe in enumerate(recipes.values()):
        recipe.save(kept / str(number))
    if recipes:
        named = {name: kept / str(number) for number, name in enumerate(recipes)}
        options["additional_config"] = serving_settings(named, delimiters_if_any(model))
    return LLM(str(folder), logits_processors=[processor_class()], **options)


def _reads(decoding: Decoding) -> bool:
    """Does it listen to the model's passes, or look across rows, which vLLM runs one by one?"""
    if not isinstance(decoding, Controlled):
        return isinstance(decoding, ListeningRun)
    mask = torch.ones(1, 1, dtype=torch.long)
    rows = DecodingState(delimiters_if_any(decoding.model), end_ids(decoding.model), mask)
    made = decoding.control.processors(decoding.model, rows)
    return bool(made.listens) or not made.turns
