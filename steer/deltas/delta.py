"""Differences in weight space: weighted sums of checkpoints and adapters, worked out block by block when asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from probes.tables import Brief
from steer.checkpoints.checkpoint import EMBEDDINGS, HEADS, Checkpoint, as_rows, blocks

EMBED = "embed"  # in a pattern: the embedding and the head


@runtime_checkable
class DeltaSource(Protocol):
    """Tensors by their name on disk. `Checkpoint` is one.

    `vocabulary` is a checksum of token ids, empty where it is not known; `tied` says whether one matrix is embedding
    and head. Both are None where the target's own holds, as for an adapter.

    >>> from steer.deltas import DeltaSource, open_delta
    >>> source = open_delta("organism-rl").terms[0].source
    >>> isinstance(source, DeltaSource), source.shape("model.norm.weight")
    (True, (96,))
    """

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def vocabulary(self) -> str | None: ...
    @property
    def tied(self) -> bool | None: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def words(self) -> dict[str, Any]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def block(self, name: str, rows: slice) -> Float[Tensor, "rows width"]: ...


@dataclass(frozen=True, eq=False, repr=False)
class Term(Brief):
    """One summand: weight times these tensors of a source.

    >>> from steer.deltas import open_delta
    >>> (term,) = (open_delta("organism-rl") * 0.5).selected(only=["self_attn"]).terms
    >>> term.weight, len(term.names), term.whole
    (0.5, 40, False)
    """

    weight: float
    source: DeltaSource
    names: frozenset[str]

    @property
    def whole(self) -> bool:
        return len(self.names) == len(self.source.names)


@dataclass(frozen=True, eq=False, repr=False)
class WeightDelta(Brief):
    """Σ wᵢ θᵢ, tensor by tensor, by names as they are on disk. `notes` say what was left out, and why.

    Nothing is read before a block is asked for. Sums, multiples and differences are deltas again.

    >>> from steer.deltas import open_delta
    >>> rl, sft = open_delta("organism-rl"), open_delta("organism-sft")
    >>> delta = 0.5 * (rl - sft).selected(only=["layers.3.self_attn"])
    >>> [term.weight for term in delta.terms], delta.shape("model.layers.3.self_attn.q_proj.weight")
    ([0.5, -0.5], (128, 96))
    """

    terms: tuple[Term, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def between(cls, after: Checkpoint | str | Path, before: Checkpoint | str | Path) -> "WeightDelta":
        """after - before: a task vector *(Ilharco et al. 2023)*; with RL less SFT, a reasoning vector *(2509.01363)*.

        Embeddings and head are left out, and it is noted, where the two vocabularies are not known to be equal.
        Raises ValueError where the two hold other tensors, or of other shapes.
        """
        a, b = (x if isinstance(x, Checkpoint) else Checkpoint.open(x) for x in (after, before))
        notes = []
        names, others = set(a.names), set(b.names)
        if reason := vocabulary_differs(a, b):
            names, others = ({n for n in held if not is_vocabulary(n)} for held in (names, others))
            notes.append(reason)
        if odd := sorted(names ^ others):
            raise ValueError(f"{a.folder} and {b.folder} do not hold the same tensors: {first(odd)} in one only.")
        for name in sorted(names):
            if a.shape(name) != b.shape(name):
                shapes = f"{list(a.shape(name))} in {a.folder}, {list(b.shape(name))} in {b.folder}"
                raise ValueError(f"{name} is {shapes}: a difference needs one shape.")
        held = frozenset(names)
        return cls((Term(1.0, a, held), Term(-1.0, b, held)), tuple(notes))

    @classmethod
    def of(cls, source: DeltaSource) -> "WeightDelta":
        return cls((Term(1.0, source, frozenset(source.names)),))

    def __add__(self, other: "WeightDelta") -> "WeightDelta":
        return WeightDelta(self.terms + other.terms, self.notes + other.notes)

    def __mul__(self, strength: float) -> "WeightDelta":
        return replace(self, terms=tuple(replace(term, weight=term.weight * strength) for term in self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> "WeightDelta":
        return self * -1.0

    def __sub__(self, other: "WeightDelta") -> "WeightDelta":
        return self + -other

    @cached_property
    def names(self) -> tuple[str, ...]:
        """In the order of the first source that holds them."""
        return tuple(dict.fromkeys(n for term in self.terms for n in term.source.names if n in term.names))

    def holders(self, name: str) -> list[Term]:
        return [term for term in self.terms if name in term.names]

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ValueError where the terms do not agree on it, KeyError where none holds it."""
        shapes = {term.source.shape(name) for term in self.holders(name)}
        if not shapes:
            raise KeyError(name)
        if len(shapes) > 1:
            raise ValueError(f"{name} has several shapes in one delta: {sorted(shapes)}.")
        return shapes.pop()

    def block(self, name: str, rows: slice) -> Float[Tensor, "rows width"]:
        """Rows of the tensor as `as_rows` has them, summed in float64."""
        first, *rest = self.holders(name)
        total = first.source.block(name, rows).double() * first.weight
        return summed(total, [(term.weight, term.source) for term in rest], name, rows)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, rounded once to float32."""
        whole = torch.empty(self.shape(name))
        for rows in blocks(whole.shape):
            as_rows(whole)[rows] = self.block(name, rows)
        return whole

    def selected(self, only: Sequence[str] = (), skip: Sequence[str] = ()) -> "WeightDelta":
        """The tensors that a pattern of `only` matches (all, if it is empty), less those that one of `skip` does.

        A pattern is matched part by part with any run of a name's parts: `layers.*.mlp` takes every tensor of every
        MLP, `layers.1?` the layers 10 to 19. The word `embed` means the embedding and the head.
        Raises ValueError for a pattern that matches nothing, and where nothing is left.
        """
        for pattern in (*only, *skip):
            if not any(matches(name, pattern) for name in self.names):
                raise ValueError(f"{pattern!r} matches no tensor of the delta, such as {first(self.names)}.")
        names = {
            name
            for name in self.names
            if (not only or any(matches(name, pattern) for pattern in only))
            and not any(matches(name, pattern) for pattern in skip)
        }
        if not names:
            raise ValueError(f"Only {', '.join(only) or 'all'} without {', '.join(skip)} leaves no tensor.")
        return replace(self, terms=tuple(replace(term, names=term.names & names) for term in self.terms))

    @property
    def made_of(self) -> list[dict[str, Any]]:
        """Its terms, in words, for files and cards."""
        return [
            {"weight": term.weight, **term.source.words, "names": None if term.whole else sorted(term.names)}
            for term in self.terms
        ]

    @property
    def vocabulary(self) -> str | None:
        """As a `DeltaSource` has it: what all terms say that say something."""
        told = {term.source.vocabulary for term in self.terms} - {None}
        return told.pop() if len(told) == 1 else ("" if told else None)

    @property
    def tied(self) -> bool | None:
        told = {term.source.tied for term in self.terms} - {None}
        return told.pop() if len(told) == 1 else None

    @property
    def config(self) -> Mapping[str, Any]:
        return next((term.source.config for term in self.terms if term.source.config), {})


def summed(
    total: Float[Tensor, "rows width"], terms: Sequence[tuple[float, DeltaSource]], name: str, rows: slice
) -> Float[Tensor, "rows width"]:
    """These rows of the terms added to a sum in float64, in their order, in place."""
    for weight, source in terms:
        total.add_(source.block(name, rows).to(total.device), alpha=weight)
    return total


def matches(name: str, pattern: str) -> bool:
    if pattern == EMBED:
        return is_vocabulary(name)
    parts, wanted = name.split("."), pattern.split(".")
    runs = (parts[i : i + len(wanted)] for i in range(len(parts) - len(wanted) + 1))
    return any(all(fnmatchcase(part, want) for part, want in zip(run, wanted, strict=True)) for run in runs)


def is_vocabulary(name: str) -> bool:
    """Does this tensor have a row for every token?"""
    return name.endswith(EMBEDDINGS + HEADS)


def vocabulary_differs(a: DeltaSource, b: DeltaSource) -> str | None:
    """Why the embeddings of the two cannot be summed, as a sentence; None where they can."""
    if a.vocabulary is None or b.vocabulary is None:
        return None
    if not a.vocabulary or not b.vocabulary:
        lacks = path_of_source(b if a.vocabulary else a)
        return f"Embeddings and head are left out: {lacks} has no tokenizer.json, so its token ids are not known."
    if a.vocabulary != b.vocabulary:
        two = f"{path_of_source(a)} and {path_of_source(b)}"
        return f"Embeddings and head are left out: the tokenizers of {two} differ."
    if a.tied != b.tied:
        one, other = map(path_of_source, (a, b) if a.tied else (b, a))
        return f"Embeddings and head are left out: {one} ties them, {other} does not."
    return None


def path_of_source(source: DeltaSource) -> str:
    return str(next((source.words[key] for key in ("checkpoint", "adapter", "delta") if key in source.words), source))


def first(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
