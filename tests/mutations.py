"""Damage to files, drawn from a seed: to their bytes, to the values they hold, and to what heads claim of the rest."""

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import yaml

HOSTILE: tuple[Any, ...] = (
    float("nan"), float("inf"), "@1e400@", -1, 0, 2**31, 2**70, -(2**63), 10_000_000_000, 10**400, 1e308, 1e-320, None,
    True, "", " ", [], {}, [[]], [None], {"": ""}, "x" * 5000, "\x1b]0;owned\x07\x1b[2J", "\u202eabc", "\x00", "\ud800",
    "../../../etc/passwd", "/dev/zero", "some-one/some-model", "(a+)+$", "L99999999999.resid_post", "1" * 5000,
    [10_000_000_000], [2**40] * 3, list(range(2000)), "\n\n", "{{ 1 // 0 }}", "NaN", 0.5, [0.5, "a"], "é\u2028",
)  # fmt: skip
_COUNTS = (0, 1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(data: bytes, kind: str, rng: random.Random) -> bytes:
    """The file's bytes, damaged once to three times: as bytes, or as a file of its kind."""
    if kind == "bytes" or rng.random() < 0.35:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data = rng.choice(BYTES)(data, rng)
        return data
    return KINDS[kind](data, rng)


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else data


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)]


def _remove(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 8, 100)) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at, new = _place(data, rng), rng.choice((b"\x00", b"\xff\xfe", b"\n", b"{", b"]", b'"', b"\x1b[2J", b"&a ", b"*a "))
    return data[:at] + new * rng.choice((1, 1, 3, 2000)) + data[at:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at : at + rng.randrange(1, 200)] * 2 + data[at:]


def _count(data: bytes, rng: random.Random) -> bytes:
    """A number of four or eight bytes where one may stand."""
    at, width = _place(data, rng), rng.choice((4, 8))
    number = rng.choice(_COUNTS) % 2 ** (8 * width)
    return data[:at] + number.to_bytes(width, "little") + data[at + width :]


def _place(data: bytes, rng: random.Random) -> int:
    """More often near the beginning, where heads are."""
    most = max(len(data), 1)
    return rng.randrange(min(most, 400)) if rng.random() < 0.6 else rng.randrange(most)


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _cut, _remove, _insert, _repeat, _count)


def tree(value: Any, rng: random.Random) -> Any:
    """The same value with one of its parts changed: another value, gone, renamed, added, swapped, or nested deep."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return rng.choice(HOSTILE)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key = rng.choice(places)
        if isinstance(holder, dict) and key not in holder or isinstance(holder, list) and key >= len(holder):
            continue
        match rng.randrange(8):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(rng.choice(HOSTILE))[:300]] = holder.pop(key)
            case 2 if isinstance(holder, dict):
                holder[str(rng.choice(("extra", "@twice@", "\x1b[31m", "")))] = rng.choice(HOSTILE)
            case 3:
                other, there = rng.choice(places)
                if isinstance(other, dict) and there in other or isinstance(other, list) and there < len(other):
                    holder[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(holder[key])
            case 4:
                holder[key] = _deep(rng.choice((3, 60, 300, 3000)), rng)
            case 5 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] = rng.choice((-holder[key], holder[key] + 1, holder[key] * 10**9, str(holder[key])))
            case _:
                holder[key] = rng.choice(HOSTILE)
    return value


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


class _Deep(str):
    """JSON that is written as it is."""


def _deep(levels: int, rng: random.Random) -> Any:
    return _Deep("@[@" * levels + "@]@" * levels) if rng.random() < 0.5 else _Deep("@{@" * levels + "@}@" * levels)


def dumps(value: Any, rng: random.Random) -> bytes:
    """JSON with what `json` does not write: numbers past the largest, keys twice, and what is nested very deep."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    for mark, plain in (("@[@", "["), ("@]@", "]"), ("@{@", '{"a":'), ("@1e400@", "1e400")):
        text = text.replace(f'"{mark}', plain).replace(f'{mark}"', plain).replace(mark, plain)
    text = text.replace("@}@", "}").replace('{"a":}', "{}").replace('}"', "}" if "@" not in text else '}"')
    if '"@twice@"' in text:
        text = text.replace('"@twice@"', json.dumps(next(iter(value), "a")) if isinstance(value, dict) else '"a"')
    return text.encode("utf-8", "surrogatepass")


def _json(data: bytes, rng: random.Random) -> bytes:
    return dumps(tree(json.loads(data), rng), rng)


def _lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.rstrip(b"\n").split(b"\n")
    at = rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            lines.insert(at, lines[rng.randrange(len(lines))])
        case 1:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        case _:
            lines[at] = dumps(tree(json.loads(lines[at]), rng), rng)
    return b"\n".join(lines) + (b"\n" if rng.random() < 0.8 else b"")


def _yaml(data: bytes, rng: random.Random) -> bytes:
    match rng.randrange(8):
        case 0:
            bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
            bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
            return data + bomb.encode() if rng.random() < 0.5 else bomb.encode() + data
        case 1:
            lines = data.split(b"\n")
            at = rng.randrange(len(lines))
            tag = rng.choice((b" !!python/object/apply:os.getcwd []", b" !!binary aGk=", b" !!set {a}", b" &x", b" *x"))
            lines[at] = lines[at].partition(b":")[0] + b":" + tag
            return b"\n".join(lines)
        case 2:
            lines = data.split(b"\n")
            at = rng.randrange(len(lines))
            return b"\n".join([*lines[:at], lines[at], *lines[at:]])
        case 3:
            return dumps(tree(yaml.safe_load(data), rng), rng)  # JSON is YAML, nearly
        case _:
            return yaml.safe_dump(_plain(tree(yaml.safe_load(data), rng)), sort_keys=False).encode("utf-8", "replace")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return (
        [_plain(item) for item in value] if isinstance(value, list) else str(value) if type(value) is _Deep else value
    )


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    fields, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    words = fields.get("__metadata__", {}).get("thinksteer")
    if words is not None and rng.random() < 0.6:
        fields["__metadata__"]["thinksteer"] = dumps(tree(json.loads(words), rng), rng).decode("utf-8", "replace")
        head = json.dumps(fields).encode()
    else:
        match rng.randrange(4):
            case 0:
                entry = rng.choice([entry for name, entry in fields.items() if name != "__metadata__"])
                entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "X", "F4", "C64"))
            case 1:
                entry = rng.choice([entry for name, entry in fields.items() if name != "__metadata__"])
                entry["shape"] = rng.choice(([], [0], [1, *entry["shape"]], [*entry["shape"], 1], [2**40], [2**32] * 2))
                if rng.random() < 0.5:
                    entry["data_offsets"] = rng.choice(([0, 0], [0, 2**40], [4, 0], [-4, 0]))
            case _:
                fields = tree(fields, rng)
        head = dumps(fields, rng)
    claimed = len(head) if rng.random() < 0.9 else rng.choice(_COUNTS)
    return claimed.to_bytes(8, "little") + head + rest


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": _json, "lines": _lines, "yaml": _yaml, "safetensors": _safetensors,
}  # fmt: skip
