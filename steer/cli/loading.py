"""The model a command is about, checked at the door: what cannot be loaded is refused before anything is read."""

import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import probes.model

if TYPE_CHECKING:
    import transformers

    from probes.scaling import Workers

DTYPES = ("auto", "float32", "bfloat16", "float16")
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")


def model_of(
    name: str, *, dtype: str = "auto", device_map: str | None = None, delimiters: tuple[str, str] | None = None
) -> "transformers.PreTrainedModel":
    """Raises ValueError for a name, a dtype or a device that is none, in a sentence that names the option."""
    check_dtype(dtype)
    check_source(name)
    _check_device(device_map)
    with _told(name):
        return probes.model.load(name, dtype=dtype, device_map=device_map, delimiters=delimiters)


@contextmanager
def opened(name: str, dtype: str, workers: AbstractContextManager["Workers"]) -> Iterator["Workers"]:
    """Workers that have loaded a model. Raises ValueError as `model_of` does."""
    check_dtype(dtype)
    check_source(name)
    with ExitStack() as stack:
        with _told(name):
            found = stack.enter_context(workers)
        yield found


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What the hub, or a machine without it, says of a model that is loaded within is told in a sentence."""
    if not sys.stderr.isatty():
        import transformers

        transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except ChildProcessError:
        raise
    except OSError as error:
        if error.errno is not None or Path(name).exists():
            raise
        if "gated" in str(error):
            terms = f"accept its terms at https://huggingface.co/{name}, and log in with `hf auth login`"
            raise ValueError(f"{name!r} is given to those alone who may have it: {terms}.") from error
        raise ValueError(f"{name!r} is not on this machine, and the hub does not give it. {_known()}") from error


def check_dtype(name: str) -> None:
    """Raise ValueError for a dtype that is none."""
    if name not in DTYPES:
        raise ValueError(f"--dtype {name} is unknown. Known: {', '.join(DTYPES)}.")


def check_source(name: str) -> None:
    """Raise ValueError for what is neither a folder of a model, nor a GGUF file, nor could be a hub's id."""
    check_place(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"The folder {name} holds no config.json: it is not a model. {_known()}")


def check_place(name: str) -> None:
    """Raise ValueError for what is neither a folder, nor a GGUF file, nor could be a hub's id."""
    path = Path(name)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return
    if path.exists():
        raise ValueError(f"{name} is a file, but not a GGUF file: it is not a model. {_known()}")
    if path.suffix == ".gguf":
        raise ValueError(f"{name} does not exist. Name another GGUF file.")
    if not _is_id(name):
        raise ValueError(f"{name!r} is not a model: there is no such folder. {_known()}")


def _is_id(name: str) -> bool:
    """Could the hub have it? `owner/name`, or a bare name of old."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None


def _known() -> str:
    embedded = ", ".join(probes.model.EMBEDDED)
    return f"Known: {embedded}, a folder, a GGUF file, or a hub id such as Qwen/Qwen3-0.6B."


def _check_device(name: str | None) -> None:
    import torch

    if name is None or name in PLACEMENTS:
        return
    known = f"Known: {', '.join(PLACEMENTS)}, or a device such as cpu or cuda:0."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device-map {name} is unknown. {known}") from error
    if device.type == "meta":
        raise ValueError(f"--device-map meta holds no numbers, so that nothing can be run there. {known}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"--device-map {name} names a device that this machine does not have. {known}") from error
