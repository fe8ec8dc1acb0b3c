"""Arms through the harness: it writes the prompts and grades the answers, and each arm's model is ours."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from probes.files import staged_file
from probes.generation.engine import Engine
from probes.model.loading import origin_of
from probes.texts import read_text
from steer.decoding.control import Controlled, DecodingControl
from steer.harness.answering import Answering
from steer.harness.table import HarnessEvaluation, Metric, Scores
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied

Arm = Recipe | DecodingControl | PreTrainedModel
PLAIN = "plain"


def evaluate_harness(
    model: PreTrainedModel,
    task: str,
    arms: Mapping[str, Arm],
    *,
    n: int | None = None,
    n_shots: int | None = None,
    chat: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    engine: Engine | None = None,
    store: Path | None = None,
    seed: int = 0,
    unsafe_code: bool = False,
) -> HarnessEvaluation:
    """A task, or group of tasks, of lm-eval over a plain model and arms: recipes, decoding controls, other models.

    `task` is one of its names, or a file in its schema, `my_task.yaml`. Of each task the first `n` documents are asked,
    with as many examples as the task says or `n_shots`; with `chat`, in the model's chat template. The prompts, the
    filters and the metrics are the harness', as are its numbers; answers and likelihoods are ours (`Answering`), so
    that arms are paired document by document. A task file may name Python files beside it, which lm-eval runs: take
    such files from nobody whom you do not trust. Tasks that run what the model writes, such as HumanEval, are refused
    unless `unsafe_code`. Raises ImportError without lm-eval, and ValueError for an unknown task, one whose data cannot
    be fetched, and a control on a task that only asks how likely given answers are.

    >>> from probes import load
    >>> from steer.harness import evaluate_harness
    >>> try:
    ...     evaluate_harness(load("organism"), "no-such-task", {})
    ... except (ImportError, ValueError) as error:
    ...     told = str(error)  # 'no-such-task' is no task of lm-eval ...
    """
    check_installed()
    if PLAIN in arms:
        raise ValueError(f"The arm {PLAIN!r} is the model as it is: name yours otherwise.")
    path = Path(task) if task.endswith((".yaml", ".yml")) else None
    manager, name = _found(path, task)
    base = Answering(model, engine=engine, batch_size=batch_size, max_new_tokens=max_new_tokens, seed=seed)
    settings = {
        "tasks": [name], "task_manager": manager, "limit": n, "num_fewshot": n_shots, "apply_chat_template": chat,
        "confirm_run_unsafe_code": unsafe_code, "bootstrap_iters": 0, "random_seed": seed, "numpy_random_seed": seed,
        "torch_random_seed": seed, "fewshot_random_seed": seed, "log_samples": True, "verbosity": None,
    }  # fmt: skip
    found = {}
    for arm, draw in {PLAIN: None, **arms}.items():
        own = replace(base, store=None if store is None else _made(Path(store) / arm))
        found[arm] = _run(own, draw, task, settings)
    return HarnessEvaluation(found)


def check_installed() -> None:
    """Raise ImportError where lm-eval is not installed.

    >>> from steer.harness import check_installed
    >>> try:
    ...     check_installed()
    ... except ImportError as error:
    ...     told = str(error)  # Tasks of lm-eval need it: pip install 'thinksteer[lm-eval]'.
    """
    if find_spec("lm_eval") is None:
        raise ImportError("Tasks of lm-eval need it: pip install 'thinksteer[lm-eval]'.")


def _run(answering: Answering, draw: Arm | None, task: str, settings: Mapping[str, Any]) -> dict[Metric, Scores]:
    from lm_eval import simple_evaluate

    if isinstance(draw, PreTrainedModel):
        answering = replace(answering, model=draw)
    if isinstance(draw, DecodingControl) and not isinstance(draw, PreTrainedModel):
        answering = replace(answering, decoding=Controlled(answering.model, draw))
    asked = harness_model(answering)
    with applied(answering.model, draw, must_run=False) if isinstance(draw, Recipe) else nullcontext(), _quiet(task):
        result = simple_evaluate(asked, **settings)
    scores = read_scores(result)
    if answering.store is not None:
        _keep(answering.store / "samples.json", result)
    return scores


def read_scores(result: Mapping[str, Any]) -> dict[Metric, Scores]:
    """The metrics of a result of the harness, document by document, beside its own numbers."""
    found: dict[Metric, Scores] = {}
    for task, samples in result["samples"].items():
        for key, told in result["results"][task].items():
            name, comma, rule = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(told, int | float):
                continue
            rows = sorted((s for s in samples if s["filter"] == rule and name in s), key=lambda s: s["doc_id"])
            values = [float(s[name]) if isinstance(s[name], int | float | bool) else np.nan for s in rows]
            found[Metric(task, name, rule)] = Scores(np.array(values, dtype=float), float(told))
    return found


def harness_model(answering: Answering) -> Any:
    """An `lm_eval.api.model.LM` that asks ours."""
    return _model_class()(answering)


@cache
def _model_class() -> type:
    from lm_eval.api.model import LM

    def __init__(self: Any, answering: Answering) -> None:
        LM.__init__(self)
        self.answering = answering
        self.batch_size = answering.batch_size

    def loglikelihood(self: Any, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG001
        _check_decides(self.answering)
        own: list[tuple[float, bool]] = self.answering.likelihoods([request.args for request in requests])
        return own

    def loglikelihood_rolling(self: Any, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG001
        _check_decides(self.answering)
        own: list[float] = self.answering.rolling([request.args[0] for request in requests])
        return own

    def generate_until(self: Any, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG001
        own: list[str] = self.answering.written([request.args for request in requests])
        return own

    def apply_chat_template(self: Any, turns: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        return str(self.answering.chat(turns, add_generation_prompt=add_generation_prompt))

    def tokenizer_name(self: Any) -> str:
        return origin_of(self.answering.model).name

    def chat_template(self: Any, chat_template: bool | str = False) -> str:  # noqa: ARG001
        return str(origin_of(self.answering.model).tokenizer.chat_template or "")

    made = {
        f.__name__: f
        for f in (__init__, loglikelihood, loglikelihood_rolling, generate_until, apply_chat_template, chat_template)
    }
    return type("Asked", (LM,), {**made, "tokenizer_name": property(tokenizer_name)})


def _check_decides(answering: Answering) -> None:
    if answering.decoding is not None:
        raise ValueError(
            f"{answering.decoding.name} decides over what is written, but this task asks how likely given answers are: "
            "leave that arm out, or take a task that generates."
        )


def _found(path: Path | None, task: str) -> tuple[Any, str]:
    """The harness' own list of tasks, with those of the file's folder, and the name in it."""
    from lm_eval.tasks import TaskManager

    if path is None:
        manager, name = TaskManager(), task
    else:
        if not path.is_file():
            raise ValueError(f"{path} is no file: give a task's name, or a file in lm-eval's schema.")
        manager, name = TaskManager(include_path=str(path.parent)), _name_in(path)
    if not manager.match_tasks([name]):
        raise ValueError(f"{name!r} is no task of lm-eval. `lm-eval ls tasks` lists them.")
    return manager, name


def _name_in(path: Path) -> str:
    lines = read_text(path, "task of lm-eval", 1 << 20).splitlines()
    names = [line.partition(":")[2].strip().strip("'\"") for line in lines if line.startswith(("task:", "group:"))]
    if not names:
        raise ValueError(f"{path} has no line `task: NAME`: it is no task of lm-eval.")
    return names[0]


@contextmanager
def _quiet(task: str) -> Iterator[None]:
    """What the harness prints is left out; where data cannot be fetched, that is said in a sentence."""
    try:
        with redirect_stdout(StringIO()):
            yield
    except (OSError, ConnectionError) as error:
        raise _unfetched(task, error) from error
    except ValueError as error:
        if "marked as unsafe" in str(error):
            raise ValueError(
                f"The task {task!r} runs programs that the model writes. Give unsafe_code=True if this machine may."
            ) from error
        if type(error).__module__.startswith("datasets"):
            raise _unfetched(task, error) from error
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("datasets", "huggingface_hub", "httpx", "requests"):
            raise _unfetched(task, error) from error
        raise


def _unfetched(task: str, error: Exception) -> ValueError:
    why = " ".join(str(error).split())[:200]
    return ValueError(
        f"The data of the task {task!r} could not be fetched ({why}). Fetch it where there is a network, and set "
        "HF_DATASETS_CACHE here to the copy."
    )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _keep(path: Path, result: Mapping[str, Any]) -> None:
    """What the harness says of each document, whole or not at all."""
    kept = {key: result[key] for key in ("results", "samples", "configs", "versions", "n-shot") if key in result}
    path.unlink(missing_ok=True)
    with staged_file(path) as stage:
        stage.write_text(json.dumps(kept, default=str), encoding="utf-8")
