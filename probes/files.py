"""Outputs that appear under their name whole or not at all, and readers that trust no file."""

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A hidden folder beside `final`, renamed to it when the block ends well, else removed.

    Raises FileExistsError if `final` exists: nothing is overwritten.
    """
    final = Path(final)
    if final.exists():
        raise FileExistsError(f"{final} exists. Name another output folder, or remove it first.")
    with _stage(final) as stage:
        yield stage
        stage.chmod(0o755)
        stage.rename(final)


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """A file in a hidden folder beside `final`, moved over it when the block ends well, else removed.

    The folder also holds what a library may write before it moves it to the name it was given.
    """
    final = Path(final)
    with _stage(final) as stage:
        yield stage / final.name
        (stage / final.name).chmod(0o644)
        (stage / final.name).replace(final)


@contextmanager
def _stage(final: Path) -> Iterator[Path]:
    """A new hidden folder beside `final`, locked while its writer lives.

    What killed writers of the same output left there, which nobody locks, is removed. The folder is locked meanwhile,
    so that no stage is seen between its making and its locking. Where a system has no such locks, nothing is removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with ExitStack() as looking:
            within = final.parent.suffix == ".partial"  # a stage of our own, locked already
            if not within and looking.enter_context(locked(final.parent)):
                for rest in final.parent.glob(f".{glob.escape(final.name)}.*.partial"):
                    with locked(rest, wait=False) as left_behind:
                        if left_behind:
                            shutil.rmtree(rest, ignore_errors=True)
            stage = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
            held.enter_context(locked(stage))
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Whether `path` could be locked; it is until the block ends, or the process."""
    if fcntl is None:
        yield False
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            got = True
        except OSError:
            got = False
        yield got
    finally:
        os.close(handle)


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a JSONL file that are not blank, each with the words that name it in a sentence.

    UTF-8, with a byte-order mark or without; a line ends at a newline alone, since JSON may hold other separators.
    Raises ValueError, naming file and line, for what is no UTF-8, no JSON, or no mapping of keys.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}. Save it as UTF-8.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"Line {number} of {path}"
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where} should hold keys, but is {line.strip()[:60]!r}.")
        yield where, fields


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file. Raises ValueError where it is no YAML, or holds none."""
    try:
        words = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(words, dict):
        raise ValueError(f"{path} holds no keys: it is not a file of ours.")
    return words


def check_keys(words: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse keys that are unknown and keys that are missing, by name."""
    known = list(known)
    if unknown := sorted(set(words) - set(known)):
        raise ValueError(f"{where} has unknown keys: {', '.join(unknown)}. Known: {', '.join(known)}.")
    if missing := [key for key in known if key not in words]:
        raise ValueError(f"{where} lacks keys: {', '.join(missing)}.")
