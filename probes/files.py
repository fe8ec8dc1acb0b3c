"""Outputs that appear under their name whole or not at all, and errors of reading that are sentences."""

import glob
import os
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

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
        stage.chmod(_mode(stage, Path.mkdir))
        try:
            stage.rename(final)
        except OSError as error:  # another writer was faster
            if not final.exists():
                raise
            raise FileExistsError(f"{final} exists. Name another output folder, or remove it first.") from error


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """A file in a hidden folder beside `final`, moved over it when the block ends well, else removed.

    The folder also holds what a library may write before it moves it to the name it was given.
    """
    final = Path(final)
    with _stage(final) as stage:
        yield stage / final.name
        (stage / final.name).chmod(_mode(stage, Path.touch))
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


def _mode(stage: Path, make: Callable[[Path], None]) -> int:
    """The permissions of what is newly made there: those that the umask leaves, which a stage itself lacks."""
    probe = stage / ".mode"
    make(probe)
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir() if probe.is_dir() else probe.unlink()
    return mode


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


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """What goes wrong inside, while `path` is read as `what`, is told in a sentence that names the path.

    Sentences that name it already pass, as do errors of what is not installed. All else, whatever library it comes
    from, is a ValueError, or for what the system refuses the same kind of OSError. `what` follows "not a whole".
    """
    try:
        yield
    except ImportError:
        raise
    except OSError as error:
        if error.errno is not None or str(path) not in str(error) or not _is_printable(error):
            raise _refused(path, what, error) from error
        raise
    except BaseException as error:  # a parser of others may raise anything, and one in Rust panics past Exception
        refused = isinstance(error, NotImplementedError) and _is_ours(error)  # of a model, not of a file
        if refused or type(error).__name__ == "OutOfMemoryError" or not _is_ordinary(error):
            raise
        named, ours = str(path) in str(error), isinstance(error, ValueError | IndexError)
        if named and ours and _is_printable(error):
            raise
        kind = IndexError if isinstance(error, IndexError) and (named or _is_sentence(error)) else ValueError
        raise kind(_one_line(error) if named else _about(path, what, error)) from error


def check_regular(path: str | Path) -> None:
    """Raise ValueError for a pipe or a device, which has no end; a folder is refused when it is opened."""
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path} is no regular file, but a pipe or a device. Name another.")


def printable(text: str) -> str:
    """The text with what would steer a terminal, or turn the direction of a line, escaped; lines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if _steers(c) else c for c in text)


def _steers(c: str) -> bool:
    if c in "\n\t":
        return False
    return unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in _TURNS


_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
_LONGEST_NAME = 255  # bytes of a file's name
_LONGEST = 2000  # of a sentence: what a file holds is quoted in it


def _is_printable(error: BaseException) -> bool:
    return printable(str(error)) == str(error) and len(str(error)) <= _LONGEST


def _is_ordinary(error: BaseException) -> bool:
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _one_line(error: BaseException) -> str:
    """What an error says, in one line that no terminal obeys; of one that says nothing, its name."""
    text = printable(" ".join(str(error).split()))
    named = isinstance(error, KeyError | AssertionError | MemoryError | AttributeError) or not text
    text = f"{type(error).__name__} {text}".strip() if named else text
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _is_sentence(error: BaseException) -> bool:
    """Did our own code say it, as a sentence? What a library says needs to be told what it is about."""
    known = isinstance(error, ValueError | IndexError | TypeError | OSError)
    return known and str(error).endswith(".") and _is_ours(error)


def _is_ours(error: BaseException) -> bool:
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and str(last.tb_frame.f_globals.get("__name__")).partition(".")[0] in ("probes", "steer")


def _about(path: str | Path, what: str, error: BaseException) -> str:
    message = _one_line(error)
    if _is_sentence(error):
        return f"{path}: {message}"
    return f"{path} is not a whole {what} ({message}). It may be truncated: make it again, or name another."


def _refused(path: str | Path, what: str, error: OSError) -> OSError:
    """What the system or a library refuses, by the path: of the same kind, so that it is caught as before."""
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError, OSError)
    kind = next(kind for kind in kinds if isinstance(error, kind))
    name = path if error.filename is None else printable(os.fsdecode(error.filename)[:300])
    if error.errno is None:
        return kind(_about(path, what, error))
    beside = "" if str(name) == str(path) else f", which {path} needs"
    reasons = {
        FileNotFoundError: f"{name} does not exist{beside}. Name another {what}.",
        PermissionError: f"{name} may not be read{beside}: change its permissions, or name another {what}.",
        IsADirectoryError: f"{name} is a folder, not a file of a {what}{beside}. Name the file.",
    }
    return kind(reasons.get(kind, f"{name} cannot be read ({error.strerror}){beside}. Name another {what}."))


def inside(folder: Path, name: str) -> Path:
    """The file of that name in the folder. Raises ValueError where it, or the link it is, leads outside.

    The cache of the hub keeps what its folders hold as links into `blobs` of the same repository: those are inside.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"{folder} names the file {name!r:.300}, which is not a file of its own folder.")
    if printable(name) != name or len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"{folder} names the file {ascii(name):.300}, which is no name of a file.")
    root = folder.resolve()
    home = root.parents[1] if root.parent.name == "snapshots" else root
    if not (folder / name).resolve().is_relative_to(home):
        raise ValueError(f"{folder / name} is a link to a place outside its folder. Copy the file itself there.")
    return folder / name


def check_keys(words: Mapping[str, Any], needed: Iterable[str], where: str, *, optional: Iterable[str] = ()) -> None:
    """Refuse keys that are unknown and keys that are missing, by name."""
    needed = list(needed)
    known = [*needed, *optional]
    if unknown := sorted(set(words) - set(known), key=str):
        raise ValueError(
            f"{where} has unknown keys: {printable(', '.join(map(str, unknown)))[:500]}. Known: {', '.join(known)}."
        )
    if missing := [key for key in needed if key not in words]:
        raise ValueError(f"{where} lacks keys: {', '.join(missing)}.")
