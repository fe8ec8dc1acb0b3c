"""Weight deltas opened: folders of ours, and PEFT adapters."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.directions.vector import check_number, number_in
from probes.fields import keys_of
from probes.files import check_keys, inside, reading
from probes.tables import Brief
from probes.texts import read_yaml
from steer.checkpoints.checkpoint import Checkpoint
from steer.deltas.delta import DeltaSource, Term, WeightDelta, path_of_source
from steer.deltas.lora import SHIPPED, Adapter, Factors, place_of

WORDS = "delta.yaml"
_KEYS = ("stored", "made_of", "notes", "rank", "vocabulary", "tied", "config")
_PARTS = ("@up", "@down", "@energy")


@dataclass(frozen=True, eq=False, repr=False)
class Stored(Brief):
    """A delta that `save` wrote: each tensor whole, or as `NAME@up` [rows, rank] times `NAME@down` [rank, width].

    >>> from steer.deltas import open_delta
    >>> stored = open_delta("organism-rl").terms[0].source
    >>> stored.words["delta"], len(stored.names), round(stored.kept_energy(), 2)
    ('organism-rl', 151, 0.98)
    """

    folder: Path
    checkpoint: Checkpoint
    about: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.partition("@")[0] for name in self.checkpoint.places))

    @property
    def vocabulary(self) -> str | None:
        out: str | None = self.about["vocabulary"]
        return out

    @property
    def tied(self) -> bool | None:
        out: bool | None = self.about["tied"]
        return out

    @property
    def config(self) -> Mapping[str, Any]:
        out: Mapping[str, Any] = self.about["config"]
        return out

    @property
    def words(self) -> dict[str, Any]:
        return {"delta": place_of(self.folder), "fingerprint": self.checkpoint.fingerprint}

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.checkpoint.places:
            return self.checkpoint.shape(name)
        return self.checkpoint.shape(f"{name}@up")[0], self.checkpoint.shape(f"{name}@down")[1]

    def block(self, name: str, rows: slice) -> Float[Tensor, "rows width"]:
        if name in self.checkpoint.places:
            return self.checkpoint.block(name, rows)
        up, down = (self.checkpoint.read(name + part) for part in _PARTS[:2])
        return Factors(up, down).block(rows)

    def check(self) -> None:
        """Raise ValueError where a tensor is neither whole nor two factors that fit, or its energies are not two."""
        places = self.checkpoint.places
        for name in self.names:
            shapes = [places[name + part][1].shape if name + part in places else None for part in ("", *_PARTS[:2])]
            whole, up, down = shapes
            if whole is None and (up is None or down is None or len(up) != 2 or len(down) != 2 or up[1] != down[0]):
                raise ValueError(f"{self.folder} holds {name} neither whole nor as two factors that fit.")
        for name in (name for name in places if name.endswith("@energy")):
            if places[name][1].shape != (2,):
                raise ValueError(f"{self.folder} holds {name} as {list(places[name][1].shape)}, but it is two numbers.")

    def kept_energy(self) -> float:
        """Share of Σ Δ² over the factored tensors that their factors keep; 1 where none is factored."""
        parts = [n for n in self.checkpoint.places if n.endswith("@energy")]
        kept, whole = sum((self.checkpoint.read(n).double() for n in parts), torch.zeros(2).double()).tolist()
        return kept / whole if whole else 1.0


def open_delta(folder: str | Path) -> WeightDelta:
    """A delta of ours, a PEFT LoRA adapter, or one of `SHIPPED` by name (see `steer.training.donors`).

    Raises FileNotFoundError for anything else, ValueError for a link to what changed.

    >>> from steer.deltas import open_delta
    >>> delta = open_delta("organism-target")
    >>> len(delta.names), delta.names[0]
    (151, 'lm_head.weight')
    """
    folder = _place(folder)
    with reading(folder, "weight delta"):
        return _opened(folder)


def _place(name: str | Path) -> Path:
    return Path(name) if Path(name).is_dir() else SHIPPED.get(str(name), Path(name))


def _opened(folder: Path, *, linked: bool = True) -> WeightDelta:
    """The delta in a folder; without `linked`, one that is linked is refused: a link leads to what is stored."""
    if (folder / "adapter_config.json").is_file():
        adapter = Adapter.open(folder)
        return WeightDelta((Term(1.0, adapter, frozenset(adapter.names)),), adapter.notes)
    if not (folder / WORDS).is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {WORDS} nor adapter_config.json: it is no weight delta. Shipped are "
            f"{', '.join(SHIPPED)}."
        )
    path = folder / WORDS
    about = _about(path)
    if about["stored"]:
        stored = Stored(folder, Checkpoint.open(folder, stem="delta"), about)
        stored.check()
        return WeightDelta((Term(1.0, stored, frozenset(stored.names)),), tuple(about["notes"]))
    if not linked:
        raise ValueError(f"{path} is linked itself, and a link leads to what is stored.")
    terms = (_linked(keys_of(words, f"Part {i} of {path}"), i, path) for i, words in enumerate(about["made_of"]))
    return WeightDelta(tuple(terms), tuple(about["notes"]))


def _about(path: Path) -> dict[str, Any]:
    """What delta.yaml says. Raises ValueError for what `save` does not write."""
    about = read_yaml(inside(path.parent, path.name), "weight delta")
    check_keys(about, _KEYS, str(path))
    kinds: dict[str, Any] = {
        "stored": bool, "made_of": list, "notes": list, "rank": int | None, "vocabulary": str | None,
        "tied": bool | None, "config": dict,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(about[key], kind):
            raise ValueError(f"{path} has {key} {str(about[key])[:80]!r}, which `save` does not write.")
    if not all(isinstance(note, str) for note in about["notes"]):
        raise ValueError(f"{path} has notes that are no texts.")
    return about


def _linked(words: Mapping[str, Any], number: int, path: Path) -> Term:
    where = f"Part {number} of {path}"
    kind = next((key for key in ("checkpoint", "adapter", "delta") if key in words), "checkpoint")
    check_keys(words, (kind, "fingerprint", "weight", "names"), where)
    place = words[kind]
    if not isinstance(place, str) or not isinstance(words["names"], list | None):
        raise ValueError(f"{where} names no {kind} with its tensors, but {place!r}. Make the delta again.")
    source: DeltaSource
    if kind == "checkpoint":
        source = Checkpoint.open(place, download=False)
    else:
        source = _opened(_place(place), linked=False).terms[0].source
    if source.words["fingerprint"] != words["fingerprint"]:
        raise ValueError(f"{path_of_source(source)} is not what it was when the delta was made: make it again.")
    names = source.names if words["names"] is None else words["names"]
    known = set(source.names)
    if absent := [name for name in names if name not in known]:
        raise ValueError(f"{where} names the tensor {str(absent[0])[:80]!r}, which {place} has not.")
    weight = number_in(words, "weight", where)
    check_number(weight, "weight", where)
    return Term(weight, source, frozenset(names))
