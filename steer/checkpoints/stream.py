"""Folders of safetensors written piece by piece: resumed at the last whole shard, named when all of it is there.

Beside the output `x` lies, while it is made, `.x.resume`: the shards made so far, and a progress file that names the
command and its inputs. A killed command, run again, goes on there. A shard counts from its last byte on. Before the
folder gets its name, every shard is read back and compared with the checksums of what was computed for it.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from probes.files import locked, reading
from probes.texts import read_json
from steer.checkpoints.checkpoint import WHOLE, places_in
from steer.checkpoints.proof import Meant, digest_of, prove_file

WORKERS = min(4, os.cpu_count() or 1)
DEPTH = 2 * WORKERS


@dataclass(frozen=True, eq=False)
class Piece:
    """One tensor of a shard: `chunks` give its numbers in order, in the dtype they are stored in."""

    bytes: int
    chunks: Callable[[], Iterator[Tensor]]


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """A safetensors file to be: all that lies before the data, and the data's pieces in order."""

    name: str
    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(piece.bytes for piece in self.pieces)


def stream(
    output: str | Path, shards: Sequence[ShardPlan], job: Mapping[str, Any], finish: Callable[[Path], None]
) -> None:
    """Write the shards to a new folder; `finish` adds what else belongs there and checks it, then it gets its name.

    `job` says, as JSON, what the command is and which inputs it has: only the same job goes on where a killed one
    stopped. Raises FileExistsError where the output exists, ValueError where another job's shards lie in the way,
    OSError, with the number of shards that are kept, where the system writes no further.
    """
    output = Path(output)
    with _stage(output, job) as (made, done):
        todo = [shard for shard in shards if not _is_done(made, shard, done)]
        needed = sum(shard.bytes for shard in todo)
        if needed > (free := shutil.disk_usage(made).free):
            raise OSError(f"it needs {needed / 1e6:,.1f} MB, but {output.parent} has {free / 1e6:,.1f} MB left")
        with tqdm(total=needed, desc="writing", unit="B", unit_scale=True, delay=2, leave=False) as bar:
            for shard in todo:
                done[shard.name] = _write(made / shard.name, shard, bar)
                _note(made.parent, job, done)
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda shard: prove_file(made / shard.name, _meant(shard, done[shard.name])), shards))
        finish(made)
        made.rename(output)


def header_of(entries: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """The head of a safetensors file with these tensors (name, dtype in its words, shape), in this order."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for name, dtype, shape in entries:
        end = at + prod(shape) * WHOLE[dtype].itemsize
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return len(text).to_bytes(8, "little") + text


def ahead(jobs: Iterable[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """What the jobs give, in their order, worked out by a few threads ahead of who takes it.

    So one waits for the disk while another computes; no more than `DEPTH` are held.
    """
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) == DEPTH:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _stage(output: Path, job: Mapping[str, Any]) -> Iterator[tuple[Path, dict[str, list[str]]]]:
    """The folder to write into, which this run alone holds, and the checksums of the shards that are whole there."""
    _refuse_existing(output)
    stage = output.parent / f".{output.name}.resume"
    try:
        (stage / "made").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{output.parent} cannot be written to ({error.strerror}). Name another output.") from error
    with locked(stage, wait=False) as alone:
        if not alone and os.name == "posix":
            raise OSError(f"Another run is writing {output} at this moment.")
        _refuse_existing(output)
        done = _progress(stage, job)
        try:
            yield stage / "made", done
        except OSError as error:
            if not done:
                shutil.rmtree(stage)
            note = f"{len(done)} whole shards are kept in {stage}: the same command goes on there." if done else ""
            reason = error.strerror or str(error)
            raise OSError(f"{output} was not written: {reason}. {note}".rstrip()) from error
        except Exception:
            shutil.rmtree(stage)  # the same inputs would end here again
            raise
        shutil.rmtree(stage)


def _refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists. Name another output folder, or remove it first.")


def _progress(stage: Path, job: Mapping[str, Any]) -> dict[str, list[str]]:
    path = stage / "progress.json"
    if not path.is_file():
        _note(stage, job, {})
        return {}
    progress = read_json(path, "note of what is written already")
    with reading(path, "note of what is written already"):
        noted, done = progress["job"], dict(progress["done"])
    if noted != json.loads(json.dumps(job)):
        raise ValueError(
            f"{stage} holds the unfinished work of another command, or of other inputs. Remove it, or name another "
            "output."
        )
    return done


def _note(stage: Path, job: Mapping[str, Any], done: Mapping[str, Sequence[str]]) -> None:
    new = stage / "progress.new"
    new.write_text(json.dumps({"job": job, "done": done}), encoding="utf-8")
    new.replace(stage / "progress.json")


def _is_done(made: Path, shard: ShardPlan, done: Mapping[str, object]) -> bool:
    """Is it whole there, with a checksum of each of its pieces?"""
    digests = done.get(shard.name)
    known = isinstance(digests, list) and len(digests) == len(shard.pieces)
    return known and _length(made / shard.name) == shard.bytes


def _write(path: Path, shard: ShardPlan, bar: "tqdm[Any]") -> list[str]:
    """The checksums of the pieces, of what was computed: the disk is asked afterwards."""
    new, digests = path.with_suffix(".new"), []

    def written(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        for chunk in chunks:
            data = chunk.contiguous().reshape(-1).view(torch.uint8)
            yield data
            file.write(data.numpy().data)
            bar.update(len(data))

    with new.open("wb") as file:
        file.write(shard.header)
        for piece in shard.pieces:
            digests.append(digest_of(written(piece.chunks())))
    if _length(new) != shard.bytes:
        raise ValueError(f"{path.name} came out with {_length(new)} bytes instead of {shard.bytes}.")
    new.replace(path)
    return digests


def _meant(shard: ShardPlan, digests: Sequence[str]) -> dict[str, Meant]:
    return {
        place.name: Meant(place.dtype, place.shape, partial(str, digest))
        for place, digest in zip(places_in(shard.header, shard.name), digests, strict=True)
    }


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
