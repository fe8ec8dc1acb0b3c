"""A file that keeps completions: whose rows they are is checked, one process at a time writes, and nothing else is
hurt."""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import gettempdir

from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from probes.files import printable, reading
from probes.generation._batch import Transformers
from probes.generation.completions import Completion, order_completions, read_completions, write_completions
from probes.generation.sampling import Sampling
from probes.generation.settings import honoured
from probes.model.loading import fingerprint, origin_of
from probes.model.passes import edits_of
from probes.texts import read_json

Key = tuple[str, int]


class Store:
    """The rows of one run in a JSONL file: those that it holds are not made again.

    A row carries the fingerprint of the weights that wrote it, and of the recipes applied to them meanwhile; another's
    rows are refused, and so are those that were otherwise prompted, sampled or decoded.
    """

    def __init__(self, path: Path, writer: str, rows: Mapping[Key, Completion]) -> None:
        self.path, self.writer, self.rows = path, writer, dict(rows)

    @classmethod
    @contextmanager
    def opened(
        cls,
        path: Path,
        model: PreTrainedModel,
        prompts: Mapping[str, Sequence[int]],
        sampling: Sampling,
        decoding: str,
        engine: str,
    ) -> "Iterator[Store]":
        """The store, for this process alone. Raises ValueError where another process has it open, where the file is no
        store, and where what it holds is another's."""
        path = Path(path)
        writer = writer_of(model, engine)
        with _alone(path):
            with reading(path, "store of completions"):
                held = read_completions(path) if path.exists() else []
                for completion in held:
                    _check(path, completion, origin_of(model).name, writer, prompts, sampling, decoding)
            yield cls(path, writer, {(c.id, c.sample): c for c in held})

    def add(self, completions: Sequence[Completion]) -> list[Completion]:
        """Append rows, signed with the fingerprint; gives them as they are stored."""
        signed = [replace(completion, fingerprint=self.writer) for completion in completions]
        write_completions(self.path, signed)
        self.rows.update({(c.id, c.sample): c for c in signed})
        return signed

    def order(self, keys: Sequence[Key]) -> None:
        """Put these rows first, in this order."""
        if keys:
            order_completions(self.path, [self.rows[key] for key in keys])


def writer_of(model: PreTrainedModel, engine: str = Transformers.name) -> str:
    """A checksum of the weights, of the recipes that are applied to the model now, and of what else changes its scores,
    another engine than transformers among it.

    Raises ValueError where a hook edits the model that has no name: what it does cannot be told from anything else.
    """
    edits = edits_of(model)
    if None in edits:
        raise ValueError(
            "The model is edited by a hook without a name, so that what it writes could not be told from other rows of "
            "a store: apply a recipe, give `attached(..., name=...)`, or generate without a store."
        )
    own, settings = fingerprint(model), honoured(model)
    words = [own, *map(str, edits), *([repr(sorted(settings.items()))] if settings else [])]
    words += [] if engine == Transformers.name else [engine]
    return own if words == [own] else sha256(" ".join(words).encode()).hexdigest()[:16]


def _check(
    path: Path,
    row: Completion,
    model: str,
    writer: str,
    prompts: Mapping[str, Sequence[int]],
    sampling: Sampling,
    decoding: str,
) -> None:
    if row.model != model:
        raise ValueError(f"{path} was written by the model {row.model!r}, not by {model!r}. Name another file.")
    if row.fingerprint != writer:
        why = "before rows named their writer" if not row.fingerprint else "by other weights, or under another recipe"
        raise ValueError(f"{path} was written by {model!r} {why}. Name another file.")
    if row.sampling != sampling:
        raise ValueError(f"{path} was sampled as {row.sampling}, not as {sampling}. Name another file.")
    if row.decoding != decoding:
        here, there = (f"under {name}" if name else "with no control" for name in (decoding, row.decoding))
        raise ValueError(f"{path} was written {there}, not {here}. Name another file.")
    if row.id in prompts and list(row.prompt_ids) != list(prompts[row.id]):
        raise ValueError(f"{path} holds another prompt under the id {row.id!r}. Name another file, or other ids.")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Locked against other processes of this machine; who holds it is told to those who come later."""
    folder = Path(gettempdir()) / f"thinksteer-{os.getuid() if hasattr(os, 'getuid') else 0}"
    folder.mkdir(exist_ok=True)
    name = sha256(str(path.resolve()).encode()).hexdigest()[:24]
    holder = folder / f"{name}.json"
    try:
        with FileLock(folder / f"{name}.lock", timeout=0):
            about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            holder.write_text(json.dumps(about), encoding="utf-8")
            yield
    except Timeout as error:
        raise ValueError(f"{path} is being written by {_holder(holder)}. Wait for it, or name another file.") from error


def _holder(path: Path) -> str:
    try:
        about = read_json(path)
        return printable(f"process {about['pid']} on {about['host']}, since {about['since']}")
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
