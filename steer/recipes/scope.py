"""Which tokens a step touches, and how strongly: a scope is a set of conditions that must all hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.directions.direction import Direction
from probes.directions.length_probe import LengthProbe
from probes.files import check_keys
from probes.model.loading import markers_of, tokenizer_of
from probes.model.sites import Site
from probes.model.tokens import present_markers
from probes.thinking._segments import step_ids
from probes.thinking.phases import Ids

Phase = Literal["all", "prompt", "thinking", "answer"]
SCOPES: tuple[Phase, ...] = get_args(Phase)
Shape = Literal["linear", "cosine", "step"]


@dataclass(frozen=True)
class Schedule:
    """The strength's multiple as a function of the thinking position t: `start` at 0, `end` from t = `over` on.

    With u = min(t / over, 1): *linear* start + (end - start) u, *cosine* end + (start - end) (1 + cos πu) / 2,
    *step* start before `over`, then end.
    """

    shape: Shape
    start: float
    end: float
    over: float

    def __post_init__(self) -> None:
        if not self.over > 0:
            raise ValueError(f"A schedule runs over a number of tokens above 0, but got over={self.over}.")

    def at(self, thought: Tensor) -> Float[Tensor, "*batch"]:
        u = (thought.float() / self.over).clamp(0, 1)
        match self.shape:
            case "linear":
                return self.start + (self.end - self.start) * u
            case "cosine":
                return self.end + (self.start - self.end) * (1 + torch.cos(torch.pi * u)) / 2
            case _:
                return torch.where(u < 1, float(self.start), float(self.end))


@dataclass(frozen=True, eq=False)
class Condition:
    """Touch a row from the end of its prompt on, if the prompt's mean projection x.v̂ at `site` is above `threshold`.

    Conditional activation steering (Lee et al. 2024), by a projection in activation units rather than a cosine. With
    `above` false, if it is not above.
    """

    site: Site
    vector: Float[Tensor, " d_model"]
    threshold: float
    above: bool = True

    @classmethod
    def of(cls, direction: Direction, threshold: float, *, above: bool = True) -> "Condition":
        return cls(direction.site, direction.vector, threshold, above)


@dataclass(frozen=True, eq=False)
class Controller:
    """The strength's multiple is clamp(gain (1 - L / set_point), -1, 1): full while the thinking is far from its
    set-point, none at it, negative past it.

    L is the number of thinking tokens so far or, with `vector`, what a linear probe predicts: x.vector + offset at
    `site`. The intervention's own direction must be the one that lengthens.
    """

    set_point: float
    gain: float = 4.0
    site: Site | None = None
    vector: Float[Tensor, " d_model"] | None = None
    offset: float = 0.0

    @classmethod
    def of(cls, probe: LengthProbe, set_point: float, *, gain: float = 1.0) -> "Controller":
        """One that predicts. With the scope's window (0, 1) it decides once, at the start of the thinking."""
        return cls(set_point, gain, probe.site, probe.vector, probe.offset)

    def __post_init__(self) -> None:
        if not self.set_point > 0:
            raise ValueError(f"A controller needs a set-point above 0 thinking tokens, but got {self.set_point}.")
        if (self.site is None) != (self.vector is None):
            raise ValueError("A controller that predicts needs both a site and a vector; one that counts, neither.")

    def at(self, length: Tensor) -> Float[Tensor, "*batch"]:
        return (self.gain * (1 - length.float() / self.set_point)).clamp(-1, 1)


@dataclass(frozen=True)
class Scope:
    """The tokens of a phase that meet every condition given.

    `tokens`: only these ids. `after`: once so many of `markers` (each a number of token sequences that say the same)
    have ended in the thinking. `window`: thinking positions [first, last), of which position 0 is the end of the
    opening delimiter. `schedule` and `controller` vary the strength over the thinking. Windows, markers, schedules and
    controllers are about the thinking, so they need the phase `thinking`.
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

    @property
    def varies(self) -> bool:
        """Is the strength's multiple other than 0 and 1 somewhere?"""
        return self.schedule is not None or self.controller is not None

    @property
    def gauge(self) -> Site | None:
        """Where the model is read to decide, if it is."""
        sites = [part.site for part in (self.condition, self.controller) if part is not None]
        return next((site for site in sites if site is not None), None)

    def words(self) -> tuple[str | dict[str, Any], dict[str, Tensor]]:
        """What a recipe's YAML says, a bare word for a bare phase, and the tensors that go beside it."""
        if self == Scope(self.phase):
            return self.phase, {}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        tensors = {}
        for name, part in plain.items():
            if isinstance(part, Schedule | Condition | Controller):
                numbers = {f.name: getattr(part, f.name) for f in fields(part)}
                if (vector := numbers.pop("vector", None)) is not None:
                    tensors[name] = vector
                plain[name] = {key: str(x) if isinstance(x, Site) else x for key, x in numbers.items()}
        return {"phase": self.phase, **{key: _lists(value) for key, value in plain.items()}}, tensors

    @classmethod
    def read(cls, words: Any, tensors: Mapping[str, Tensor | None], where: str) -> "Scope":
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
            known["markers"] = tuple(tuple(ids) for ids in known["markers"])
            known["tokens"], known["window"] = tuple(known["tokens"]), tuple(known["window"])
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


_PARTS: dict[str, type] = {"schedule": Schedule, "condition": Condition, "controller": Controller}


def _tokens(share: float, budget: int) -> int:
    if not 0 < share <= 1 or budget < 1:
        raise ValueError(f"A share of a budget is above 0 and at most 1, but got {share} of {budget} tokens.")
    return max(1, round(share * budget))


def _lists(value: Any) -> Any:
    return [_lists(x) for x in value] if isinstance(value, tuple) else value


def _read_part(kind: type, words: Any, vector: Tensor | None, where: str) -> Any:
    if not isinstance(words, dict):
        raise ValueError(f"{where} is {words!r}, which is no mapping.")
    names = [f.name for f in fields(kind) if f.name != "vector"]
    check_keys(words, names, where)
    values = {key: Site.parse(x) if key == "site" and isinstance(x, str) else x for key, x in words.items()}
    wrong = [key for key, x in values.items() if not isinstance(x, Site | str | bool | int | float | None)]
    if wrong:
        raise ValueError(f"{where} has {wrong[0]} {values[wrong[0]]!r}, which is no number.")
    if words.get("shape", "step") not in get_args(Shape):
        raise ValueError(f"{where} has shape {words['shape']!r}. Known: {', '.join(get_args(Shape))}.")
    if vector is not None:
        values["vector"] = vector
    elif values.get("site") is not None:
        raise ValueError(f"{where} has no vector beside it in the recipe's safetensors file.")
    return kind(**values)
