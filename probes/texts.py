"""JSON, JSONL and YAML of others, read within bounds: no key twice, no aliases, no more than such a file holds."""

import json
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from probes.files import check_regular, printable, reading

# The most bytes that are read of one: the largest known are an index of shards (15 MB) and a list of tensor names.
JSON_BYTES, LINE_BYTES, YAML_BYTES = 64 << 20, 64 << 20, 16 << 20
DEPTH = 200  # of what is nested in it

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_json(path: Path, what: str = "file of JSON", *, finite: bool = True) -> Any:
    """What a JSON file holds. UTF-8, with a byte-order mark or without.

    Raises FileNotFoundError, or ValueError, naming the file, for what is no JSON, for a key that is there twice, for
    what is larger than `JSON_BYTES` or deeper than `DEPTH`, and for numbers that are not finite, unless `finite` is
    false: a model's config may hold such.
    """
    return parse_json(read_text(path, what, JSON_BYTES), str(path), finite=finite)


def read_text(path: Path, what: str, limit: int) -> str:
    """The text of a file in UTF-8. Raises as `read_json` does, before it reads, for one of more than `limit` bytes."""
    with reading(path, what):
        check_regular(path)
        if (size := Path(path).stat().st_size) > limit:
            raise ValueError(f"{path} has {size:,} bytes, and a {what} at most {limit:,}. Is it another kind of file?")
        try:
            return Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}. Save it as UTF-8.") from error


def parse_json(text: str, where: str, *, finite: bool = True) -> Any:
    """What JSON says; `where` names it in a sentence. Raises ValueError as `read_json` does."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{where} holds {constant}, which is no finite number.")

    def number(digits: str) -> float:
        value = float(digits)
        if finite and not isfinite(value):
            refuse(digits[:40])
        return value

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(items)
        if len(fields) < len(items):
            _refuse_twice([key for key, _ in items], where)
        return fields

    constant = refuse if finite else float
    try:
        value = json.loads(text, parse_constant=constant, parse_float=number, object_pairs_hook=pairs)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}. It may be truncated: make it again.") from error
    except ValueError as error:
        if where in str(error):
            raise
        raise ValueError(f"{where} holds a number that is too long to read: {error}.") from error
    _check_depth(value, where)
    return value


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a JSONL file that are not blank, each with the words that name it in a sentence.

    UTF-8, with a byte-order mark or without; a line ends at a newline alone, since JSON may hold other separators.
    Raises ValueError, naming file and line, for what is no UTF-8, no JSON as `read_json` reads it, or no mapping of
    keys, and for a line of more than `LINE_BYTES`.
    """
    for number, line in enumerate(_lines(Path(path)), start=1):
        where = f"Line {number} of {path}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}, in line {number}. Save it as UTF-8.") from error
        if not text.strip():
            continue
        fields = parse_json(text, where)
        if not isinstance(fields, dict):
            raise ValueError(f"{where} should hold keys, but is {text.strip()[:60]!r}.")
        yield where, fields


def read_yaml(path: Path, what: str = "file of ours") -> dict[str, Any]:
    """The keys of a YAML file, of texts, numbers, truths, lists and mappings alone.

    Raises ValueError where it is no YAML or holds no keys, where a key is there twice, for anchors, aliases and tags,
    which a file can be made huge by, and for what is larger than `YAML_BYTES` or deeper than `DEPTH`.
    """
    with reading(path, what):
        text = read_text(path, what, YAML_BYTES)
        try:
            _check_events(text, str(path))
            words = yaml.load(text, Loader=_Once)
        except yaml.YAMLError as error:
            reason = printable(" ".join(str(error).split()))
            raise ValueError(f"{path} is not YAML: {reason}. It may be truncated: make it again.") from error
        if not isinstance(words, dict):
            raise ValueError(f"{path} holds no keys: it is not a {what}.")
        _check_depth(words, str(path))
        return words


class _Once(_Loader):  # type: ignore[misc, valid-type]
    """Takes no key twice. `yaml.load` with it makes nothing but what `safe_load` makes."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        if len(set(map(str, keys))) < len(keys):
            _refuse_twice(list(map(str, keys)), f"A mapping in line {node.start_mark.line + 1}")
        fields: dict[Any, Any] = super().construct_mapping(node, deep)
        return fields


def _check_events(text: str, where: str) -> None:
    """Refuse, before anything is built, what a mapping of ours never has."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise ValueError(f"{where} is nested deeper than {DEPTH}: it is no file of ours.")
        anchor, tag = (getattr(event, name, None) for name in ("anchor", "tag"))
        if anchor is not None:
            raise ValueError(f"{where} has an anchor or an alias ({anchor}): write what it stands for.")
        if tag is not None:
            raise ValueError(f"{where} has a tag ({tag}): write plain texts, numbers, lists and mappings.")


def _refuse_twice(keys: Sequence[str], where: str) -> None:
    twice = next(key for key in keys if keys.count(key) > 1)
    raise ValueError(f"{where} has the key {twice[:80]!r} twice. Keep one of them.")


def _check_depth(value: Any, where: str) -> None:
    """Refuse what is nested too deep, and what is neither text, number, truth, list nor a mapping of texts."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH:
            raise ValueError(f"{where} is nested deeper than {DEPTH}: it is no file of ours.")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                if odd := [key for key in item if not isinstance(key, str)]:
                    raise ValueError(f"{where} has the key {odd[0]!r}, which is no text.")
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif not isinstance(item, str | int | float | None):
                raise ValueError(f"{where} holds {item!r}, which is no text, number or truth. Put it in quotes.")
        level = inner


def _lines(path: Path) -> Iterator[bytes]:
    with reading(path, "file of lines of JSON"):
        check_regular(path)  # before it is opened: a pipe waits for whoever writes
        with Path(path).open("rb") as file:
            while line := file.readline(LINE_BYTES + 1):
                if len(line) > LINE_BYTES:
                    raise ValueError(f"{path} has a line of more than {LINE_BYTES:,} bytes. Is it another kind?")
                yield line
