"""target + strength · delta as a new checkpoint of the same layout, at any size, a block of rows at a time."""

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from probes.files import inside
from probes.tables import Shown, Table
from steer.checkpoints.card import Section, write_card
from steer.checkpoints.checkpoint import EMBEDDINGS, HEADS, WHOLE, Checkpoint, TensorInfo, blocks
from steer.checkpoints.hub import check_repository, push
from steer.checkpoints.proof import pieces
from steer.checkpoints.stream import DEPTH, Piece, ShardPlan, ahead, stream
from steer.deltas.delta import (
    DeltaSource,
    WeightDelta,
    first,
    is_vocabulary,
    path_of_source,
    summed,
    vocabulary_differs,
)

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_HARMLESS = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Shown):
    """What a sum will touch: `names` gives the delta's name of each tensor of the target that changes.

    >>> from probes import load
    >>> from probes.model import tokenizer_of
    >>> from steer.deltas import Plan, open_delta
    >>> model = load("organism")
    >>> files = model.save_pretrained("target"), tokenizer_of(model).save_pretrained("target")
    >>> Plan.of("target", open_delta("organism-rl"), only=["layers.0.self_attn"]).table().rows[-1]
    ('tensors touched, of all', '10 of 151')
    """

    target: Checkpoint
    delta: WeightDelta
    names: Mapping[str, str]
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        target: Checkpoint | str | Path,
        delta: WeightDelta,
        *,
        strength: float = 1.0,
        only: Sequence[str] = (),
        skip: Sequence[str] = (),
    ) -> "Plan":
        """Raises ValueError where the two do not belong together: nothing but headers and words is read for that.

        Embeddings and head are left out, and it is noted, unless all vocabularies are known to be equal.
        """
        target = target if isinstance(target, Checkpoint) else Checkpoint.open(target)
        delta = (delta.selected(only, skip) if only or skip else delta) * strength
        notes = list(delta.notes)
        for source in dict.fromkeys(term.source for term in delta.terms):
            notes += _differences(target, source)
            if any(is_vocabulary(n) for n in delta.names) and (reason := vocabulary_differs(target, source)):
                notes.append(reason)
                delta = delta.selected(skip=["embed"])
        changing, names = set(delta.names), {}
        for name in target.names:
            if name not in changing:
                continue
            if delta.shape(name) == target.shape(name):
                names[name] = name
            elif is_vocabulary(name):
                notes.append(f"{name} is left out: it is {target.shape(name)}, and {delta.shape(name)} in the delta.")
            else:
                raise ValueError(
                    f"{name} is {list(target.shape(name))} in {target.folder}, but {list(delta.shape(name))} in the "
                    "delta: they are not of one architecture."
                )
        if lost := sorted(changing - set(target.names)):
            raise ValueError(f"{target.folder} lacks tensors of the delta, or holds no numbers there: {first(lost)}.")
        names |= _stored_head(target, names)
        if strength and not names:
            raise ValueError(
                f"The delta changes no tensor of {target.folder}: it holds none, or none that may be added."
                + (f" {' '.join(notes)}" if notes else "")
            )
        return cls(target, delta, names if strength else {}, tuple(dict.fromkeys(notes)))

    @property
    def bytes(self) -> int:
        return sum(shard.path.stat().st_size for shard in self.target.shards)

    def table(self) -> Table:
        """The tensors touched, by kind."""
        kinds = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in self.names)
        rows = [
            *kinds.items(),
            ("tensors touched, of all", f"{len(self.names)} of {len(self.target.places)}"),
            *(("note", note) for note in self.notes),
        ]
        return Table((self.target.folder.name, ""), tuple(rows))

    def needs(self) -> Table:
        """Memory beyond the program's own, and disk."""
        shapes = [self.target.shape(name) for name in self.names]
        widest = max((blocks(shape)[0].stop * (shape[-1] if len(shape) > 1 else 1) for shape in shapes), default=0)
        rows = (
            ("memory for blocks, MB", DEPTH * 4 * 8 * widest / 1e6),  # a sum, a summand, a product, what is rounded
            ("disk, GB", self.bytes / 1e9),
        )
        return Table(("needs", ""), rows)

    def values(self, name: str) -> Iterator[Tensor]:
        """The new tensor in blocks of rows, summed in float64, rounded once to the target's dtype.

        A checkpoint that occurs more than once, as the target perhaps, counts once, with its weights summed: where it
        cancels it is not read. Raises ValueError where a number is not finite, naming the source.
        """
        own, others = self._summands(name)
        shape = self.target.places[name][1].shape
        return ahead(partial(self._values, name, rows, own, others) for rows in blocks(shape))

    def _values(self, name: str, rows: slice, own: float, others: Sequence[tuple[float, DeltaSource]]) -> Tensor:
        dtype = WHOLE[self.target.places[name][1].dtype]
        limit = torch.finfo(dtype).max
        if own or not others:
            base, rest = self.target.block(name, rows).double() * own, others
        else:
            base, rest = others[0][1].block(self.names[name], rows).double() * others[0][0], others[1:]
        total = summed(base, rest, self.names[name], rows)
        low, high = torch.aminmax(total)
        if not (float(low) >= -limit and float(high) <= limit):
            raise ValueError(self._odd(name, rows, others, dtype))
        return total.to(dtype)

    def _summands(self, name: str) -> tuple[float, list[tuple[float, DeltaSource]]]:
        own, merged = 1.0, dict[Any, tuple[float, DeltaSource]]()
        for term in self.delta.holders(self.names[name]):
            source, key = term.source, None
            if isinstance(source, Checkpoint):
                key = source.fingerprint
                if key == self.target.fingerprint and name == self.names[name]:
                    own += term.weight
                    continue
            before = merged.get(key or id(source), (0.0, source))[0]
            merged[key or id(source)] = (before + term.weight, source)
        return own, [(weight, source) for weight, source in merged.values() if weight]

    def _odd(self, name: str, rows: slice, others: Sequence[tuple[float, DeltaSource]], dtype: torch.dtype) -> str:
        for source in (self.target, *(source for _, source in others)):
            known = name if source is self.target else self.names[name]
            if not bool(source.block(known, rows).isfinite().all()):
                return f"{name} holds numbers that are not finite in {path_of_source(source)}: nothing was written."
        return f"{name} would leave the range of {str(dtype)[6:]}: take a smaller strength. Nothing was written."


def add(
    target: Checkpoint | str | Path,
    delta: WeightDelta,
    output: str | Path,
    *,
    strength: float = 1.0,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    push_to: str | None = None,
    private: bool = True,
) -> Plan:
    """Write target + strength · delta to a new folder of the target's layout, that plain transformers loads.

    Memory is a few blocks of rows, whatever the model. Tensors that are not touched are copied byte for byte, as are
    config and tokenizer. Beside them lie a card and `vector.yaml`, which say what was summed. Interrupted, the same
    call goes on at the last whole shard (`steer.checkpoints.stream`).
    Raises ValueError, FileExistsError, OSError; under its name the folder is whole or not there.

    >>> from probes import load
    >>> from probes.model import tokenizer_of
    >>> from steer.deltas import add, open_delta
    >>> model = load("organism")
    >>> files = model.save_pretrained("target"), tokenizer_of(model).save_pretrained("target")
    >>> plan = add("target", open_delta("organism-rl"), "summed", strength=0.5, only=["self_attn"])
    >>> len(plan.names), load("summed").num_parameters()
    (40, 756000)
    """
    check_repository(push_to)
    plan = Plan.of(target, delta, strength=strength, only=only, skip=skip)
    job = {"target": plan.target.words, "terms": plan.delta.made_of, "tensors": sorted(plan.names)}
    words = {
        "target": plan.target.words,
        "strength": float(strength),
        "only": list(only),
        "skip": list(skip),
        "delta": (delta.selected(only, skip) if only or skip else delta).made_of,
        "notes": list(plan.notes),
    }

    def finish(folder: Path) -> None:
        _copy_words(plan.target, folder)
        (folder / "vector.yaml").write_text(yaml.safe_dump(words, sort_keys=False), encoding="utf-8")
        section = Section("Weights summed", "Also in `vector.yaml`.", plan.table())
        write_card(folder / "README.md", plan.target.folder.name, "weight arithmetic", [section])
        _verify(plan.target, folder)

    stream(output, [_shard_plan(plan, i) for i in range(len(plan.target.shards))], job, finish)
    if push_to is not None:
        push(output, push_to, private=private)
    return plan


def _shard_plan(plan: Plan, i: int) -> ShardPlan:
    shard = plan.target.shards[i]

    def piece(place: TensorInfo) -> Piece:
        if place.name not in plan.names or plan._summands(place.name) == (1.0, []):
            return Piece(place.bytes, lambda: pieces(plan.target.read(place.name)))
        return Piece(place.bytes, partial(plan.values, place.name))

    return ShardPlan(shard.path.name, shard.header, tuple(map(piece, shard.places)))


def _stored_head(target: Checkpoint, names: Mapping[str, str]) -> dict[str, str]:
    """Where a tied head is stored as well, it stays what the embedding is."""
    embedding = next((name for name in names if name.endswith(EMBEDDINGS)), None)
    heads = [name for name in target.places if name.endswith(HEADS)] if target.tied and embedding else []
    return dict.fromkeys(heads, names[embedding]) if embedding else {}


def _differences(target: Checkpoint, source: DeltaSource) -> list[str]:
    if not source.config or not target.config:
        return []
    a, b = target.config, source.config
    odd = sorted(key for key in (a.keys() | b.keys()) - _HARMLESS if a.get(key) != b.get(key))
    where = f"{target.folder} and {path_of_source(source)}"
    if "model_type" in odd:
        raise ValueError(f"{where} are of two families: {a.get('model_type')} and {b.get('model_type')}.")
    return (
        [f"The configs of {where} differ: {', '.join(f'{k} {a.get(k)!r}, {b.get(k)!r}' for k in odd)}."] if odd else []
    )


def _copy_words(target: Checkpoint, folder: Path) -> None:
    """All files of the target but its weights and its card; no folders."""
    for path in sorted(target.folder.iterdir()):
        ours = path == target.index
        if path.name.startswith(".") or path.name == "README.md" or path.is_dir():
            continue
        if ours or not path.name.endswith(_WEIGHTS):
            shutil.copyfile(inside(target.folder, path.name), folder / path.name)


def _verify(target: Checkpoint, folder: Path) -> None:
    """Every tensor is there, as it was in the target; that its numbers are finite was seen as they were made."""
    made = Checkpoint.open(folder)
    for name, (_, place) in target.places.items():
        if made.places[name][1] != place:
            raise ValueError(f"{name} came out wrong in {folder}: {made.places[name][1]} instead of {place}.")
