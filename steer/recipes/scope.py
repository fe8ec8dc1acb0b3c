"""Which tokens a step touches, and how strongly: a scope is a set of conditions that must all hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import PreTrainedModel

from probes.files import check_keys
from probes.model.loading import markers_of, tokenizer_of
from probes.model.sites import Site
from probes.model.tokens import present_markers
from probes.tables import Brief
from probes.thinking._segments import step_ids
from probes.thinking.phases import Ids
from probes.words import checked
from steer.interventions.activation import check_vector
from steer.recipes.condition import Condition
from steer.recipes.controller import Controller, Schedule
from steer.recipes.fields import fields_of, read

Phase = Literal["all", "prompt", "thinking", "answer"]
SCOPES: tuple[Phase, ...] = get_args(Phase)


@checked
@dataclass(frozen=True, repr=False)
class Scope(Brief):
    """The tokens of a phase that meet every condition given.

    `tokens`: only these ids. `after`: once so many of `markers` (each a number of token sequences that say the same)
    have ended in the thinking. `window`: thinking positions [first, last), of which position 0 is the end of the
    opening delimiter. `schedule` and `controller` vary the strength over the thinking. Windows, markers, schedules and
    controllers are about the thinking, so they need the phase `thinking`. Raises ValueError for what does not go
    together.

    >>> from steer import Schedule, Scope
    >>> print(Scope("thinking", window=(0, 20), schedule=Schedule("cosine", start=1.0, end=0.0, over=20)))
    thinking, positions 0 to 20, schedule
    >>> Scope.first(0.25, budget=400).window
    (0, 100)
    """

    phase: Phase = "all"
    tokens: Ids = ()
    after: int = 0
    markers: tuple[Ids, ...] = ()
    window: tuple[int, int | None] = (0, None)
    schedule: Schedule | None = None
    condition: Condition | None = None
    controller: Controller | None = None

    def __post_init__(self) -> None:
        about = {
            "after": self.after > 0,
            "window": self.window != (0, None),
            "schedule": self.schedule is not None,
            "controller": self.controller is not None,
        }
        if self.phase != "thinking" and (named := [name for name, given in about.items() if given]):
            raise ValueError(f"{named[0]} is about the thinking: give it with phase='thinking', not {self.phase!r}.")
        if self.after < 0 or (self.after > 0) != bool(self.markers):
            raise ValueError("after counts markers: give both a number above 0 and the markers, or neither.")
        first, last = self.window
        if first < 0 or (last is not None and last <= first):
            raise ValueError(f"The window {self.window} of thinking positions is empty.")
        parts = [part for part in (self.condition, self.controller) if part is not None and part.site is not None]
        if len({part.site for part in parts}) > 1:
            raise ValueError("A condition and a controller of one scope must read one site.")

    @classmethod
    def of(cls, scope: "str | Scope") -> "Scope":
        """A phase by its name, or a scope as it is. Raises ValueError for a name that is no phase."""
        if isinstance(scope, str) and scope not in SCOPES:
            raise ValueError(f"{scope!r} is no scope. Known: {', '.join(SCOPES)}.")
        return scope if isinstance(scope, Scope) else cls(scope)

    @classmethod
    @checked
    def at_steps(cls, model: PreTrainedModel, delimiter: str = "\n\n", *, phase: Phase = "thinking") -> "Scope":
        """The tokens that end a step of the thinking, as SEAL steers them (Chen et al. 2025): all ids whose text holds
        `delimiter`. Raises ValueError where the vocabulary has none."""
        return cls(phase, tokens=step_ids(tokenizer_of(model), delimiter))

    @classmethod
    def after_marker(cls, model: PreTrainedModel, n: int, markers: Sequence[str] | None = None) -> "Scope":
        """The thinking from the end of the n-th reflection marker on. Raises ValueError where the vocabulary lacks all
        of them; a marker that it lacks is left out, and named by `probes.model.tokens.present_markers`."""
        wanted = tuple(markers_of(model) if markers is None else markers)
        found, absent = present_markers(tokenizer_of(model), wanted)
        if not found:
            raise ValueError(f"The vocabulary has none of the markers {', '.join(map(repr, absent))}: name others.")
        return cls("thinking", after=n, markers=tuple(ids for ways in found.values() for ids in ways))

    @classmethod
    def first(cls, share: float, *, budget: int) -> "Scope":
        """The first `share` of a budget of thinking tokens."""
        return cls("thinking", window=(0, _tokens(share, budget)))

    @classmethod
    def last(cls, share: float, *, budget: int) -> "Scope":
        """The last `share` of a budget of thinking tokens, and what goes beyond it."""
        return cls("thinking", window=(budget - _tokens(share, budget), None))

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where a vector that decides does not fit the site it is read at."""
        for part in (self.condition, self.controller):
            if part is not None and part.site is not None and part.vector is not None:
                check_vector(model, part.site, part.vector)

    @property
    def varies(self) -> bool:
        """Is the strength's multiple other than 0 and 1 somewhere?"""
        return self.schedule is not None or self.controller is not None

    @property
    def gauge(self) -> Site | None:
        """Where the model is read to decide, if it is."""
        sites = [part.site for part in (self.condition, self.controller) if part is not None]
        return next((site for site in sites if site is not None), None)

    def to_dict(self) -> tuple[str | dict[str, Any], dict[str, Tensor]]:
        """What a recipe's YAML says, a bare word for a bare phase, and the tensors that go beside it."""
        if self == Scope(self.phase):
            return self.phase, {}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        tensors = {}
        for name, part in plain.items():
            if isinstance(part, Schedule | Condition | Controller):
                plain[name] = fields_of(part)
                if (vector := getattr(part, "vector", None)) is not None:
                    tensors[name] = vector
        return {"phase": self.phase, **{key: _lists(value) for key, value in plain.items()}}, tensors

    @classmethod
    def from_dict(cls, words: Any, tensors: Mapping[str, Tensor | None], where: str) -> "Scope":
        """The scope that `words` wrote. Raises ValueError, naming `where`, for what it could not have written."""
        if isinstance(words, str):
            if words not in SCOPES:
                raise ValueError(f"{where} has scope {words!r}. Known: {', '.join(SCOPES)}.")
            return cls(words)
        if not isinstance(words, dict):
            raise ValueError(f"{where} has scope {words!r}, which is neither a word nor a mapping.")
        known = {f.name: words.get(f.name, f.default) for f in fields(cls)}
        check_keys({**known, **words}, known, f"The scope of {where}")
        if known["phase"] not in SCOPES:
            raise ValueError(f"{where} has phase {known['phase']!r}. Known: {', '.join(SCOPES)}.")
        for name, kind in _PARTS.items():
            if known[name] is not None:
                known[name] = _read_part(kind, known[name], tensors.get(name), f"{name} of the scope of {where}")
        try:
            known["markers"] = tuple(_token_ids(ids, where) for ids in known["markers"])
            known["tokens"], (first, last) = _token_ids(known["tokens"], where), known["window"]
            known["window"] = (_count(first, "window", where), last if last is None else _count(last, "window", where))
            known["after"] = _count(known["after"], "after", where)
            return cls(**known)
        except TypeError as error:
            raise ValueError(f"The scope of {where} is malformed: {error}.") from error

    def __str__(self) -> str:
        said: list[str] = [self.phase]
        if self.tokens:
            said.append(f"at {len(self.tokens)} token ids" if len(self.tokens) > 4 else f"at ids {self.tokens}")
        if self.after:
            said.append(f"after marker {self.after}")
        if self.window != (0, None):
            said.append(f"positions {self.window[0]} to {self.window[1] or 'the end'}")
        said += [f"{type(part).__name__.lower()}" for name in _PARTS if (part := getattr(self, name)) is not None]
        return ", ".join(said)


_VOCABULARY, _POSITIONS = 1 << 24, 1 << 31  # more token ids and positions than any model has
_PARTS: dict[str, type] = {"schedule": Schedule, "condition": Condition, "controller": Controller}


def _tokens(share: float, budget: int) -> int:
    if not 0 < share <= 1 or budget < 1:
        raise ValueError(f"A share of a budget is above 0 and at most 1, but got {share} of {budget} tokens.")
    return max(1, round(share * budget))


def _token_ids(values: Any, where: str) -> Ids:
    """Raise ValueError for what is no list of token ids: a table as long as the largest is made of them."""
    if not isinstance(values, list | tuple) or not all(type(i) is int and 0 <= i < _VOCABULARY for i in values):
        raise ValueError(f"The scope of {where} has {str(values)[:80]}, which are no token ids below {_VOCABULARY:,}.")
    return tuple(values)


def _count(value: Any, name: str, where: str) -> int:
    if type(value) is not int or abs(value) > _POSITIONS:
        raise ValueError(f"The scope of {where} has {name} {str(value)[:80]}, which is no number of tokens.")
    return value


def _lists(value: Any) -> Any:
    return [_lists(x) for x in value] if isinstance(value, tuple) else value


def _read_part(kind: type, values: Any, vector: Tensor | None, where: str) -> Any:
    if vector is None and isinstance(values, dict) and values.get("site") is not None:
        raise ValueError(f"{where} has no vector beside it in the recipe's safetensors file.")
    return read(kind, values, where, vector=vector)
