"""The recipes at work in one worker: before each pass it says which rows of the table each token has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thinksteer_vllm.machine import PHASES, Machine, Track
from thinksteer_vllm.recipes import SITES, Recipe
from thinksteer_vllm.refusal import Refused
from thinksteer_vllm.scopes import Scopes
from thinksteer_vllm.settings import ADMITTED, KEY, STRENGTH, VERSION, Settings
from thinksteer_vllm.slots import Slots
from thinksteer_vllm.tables import Place, Tokens, index_of, places


@dataclass(frozen=True)
class Asked:
    """A request that is steered: its recipe's number, and what all strengths are multiplied by."""

    recipe: int
    strength: float
    prompt: Sequence[int]


@dataclass(frozen=True)
class Share:
    """A request's part of a pass: `start` to `stop` of its tokens, the first of which is its token number `begin`.
    `known` gives its ids, from the first up to the number asked for, as the host knows them."""

    request: str
    asked: Asked
    start: int
    stop: int
    begin: int
    known: Callable[[int], Sequence[int] | np.ndarray]


@dataclass(eq=False)
class _Row:
    """What is remembered of a request: its slot (-1: another needed it), how many tokens the slot has seen, how many
    were counted."""

    track: Track
    slot: int = -1
    seen: int = -1
    counted: int = 0


class Steering:
    """`tokens` and `at` are read by the operation that edits; `fill` writes the tokens."""

    def __init__(
        self,
        settings: Settings,
        widths: Mapping[str, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        n_tokens: int,
        n_requests: int,
    ) -> None:
        self.recipes: list[Recipe] = list(settings.recipes.values())
        self.names = {recipe.name: i for i, recipe in enumerate(self.recipes)}
        self.machine: Machine = settings.machine
        self.by_phase = bool(settings.delimiters.open)
        self.device, self.sites = device, {step.site for recipe in self.recipes for step in recipe.steps}
        self.scopes = Scopes.of(self.recipes, settings.markers, device)
        self.tokens = Tokens.of(self.scopes.rows.shape[1], n_tokens, device)
        self.slots = Slots.of(self.machine, n_requests, device)
        self.places = places(self.recipes, widths, dtype, device)
        n_recipes, n_steps = self.scopes.rows.shape
        self.fired = torch.zeros(n_recipes, len(PHASES), n_steps, dtype=torch.long, device=device)
        self.rebuilt = 0
        self._free, self._rows, self._dirty = list(range(n_requests)), dict[str, _Row](), False

    def at(self, layer: int, site: str) -> list[Place]:
        """The places of a site, the whole before its heads."""
        return [place for (own, name, _), place in self.places.items() if (own, name) == (layer, site)]

    def table(self) -> dict[int, list[Place]]:
        """By the index that the operation gets."""
        return {index_of(layer, name): self.at(layer, name) for layer, name, _ in self.places if name in SITES}

    def asked(self, extra: Mapping[str, Any] | None, prompt: Sequence[int] | None) -> Asked | None:
        """What a request asks for that the front end has let in."""
        name = (extra or {}).get(KEY)
        if name is None:
            return None
        if name not in self.names or prompt is None or not (extra or {}).get(ADMITTED):
            raise Refused(
                f"A request for the recipe {name!r} came past the front end, which refuses or salts it: send requests "
                "by a server of vLLM that has the plugin, or by LLM."
            )
        return Asked(self.names[name], float((extra or {}).get(STRENGTH, 1.0)), prompt)

    @torch.inference_mode()
    def fill(self, shares: Sequence[Share], input_ids: Tensor) -> None:
        """Write the rows of the tokens of a pass. What is not steered, and what pads, has row 0."""
        if self._dirty:
            self.tokens.rows.zero_()
        self._dirty = bool(shares)
        if not shares:
            return
        self._seat(shares)
        steps = [share for share in shares if self._steps(share)]
        parts = [self._step(steps, input_ids)] if steps else []
        parts += [self._read(share) for share in shares if share not in steps]
        columns = parts[0] if len(parts) == 1 else [torch.cat(column, dim=-1) for column in zip(*parts, strict=True)]
        place, recipe, strength, counted, phase, thought, ids, marked = columns
        rows, multiples = self.scopes.touch(recipe, (phase, thought, marked, ids))
        self.tokens.rows[:, place], self.tokens.multiples[:, place] = rows.T, multiples.T
        self.tokens.strength[place] = strength
        touched = ((rows > 0) & counted[:, None]).long()
        self.fired.view(-1, rows.shape[1]).index_add_(0, recipe * len(PHASES) + phase, touched)

    def forget(self, living: Callable[[str], bool]) -> None:
        """Requests that are gone leave their slots."""
        for request in [request for request in self._rows if not living(request)]:
            row = self._rows.pop(request)
            if row.slot >= 0:
                self._free.append(row.slot)

    def log(self) -> list[dict[str, Any]]:
        """By recipe, step and phase: the tokens that were touched, each once, though a request may be computed anew."""
        counts, phases = self.fired.tolist(), PHASES if self.by_phase else ("all",)
        return [
            {"recipe": recipe.name, "step": k, "what": str(step), "phase": phase, "tokens": counts[i][j][k]}
            for i, recipe in enumerate(self.recipes)
            for k, step in enumerate(recipe.steps)
            for j, phase in enumerate(phases)
            if counts[i][j][k]
        ]

    def status(self) -> dict[str, Any]:
        """That steering is on, and what with."""
        prints = {recipe.name: recipe.fingerprint for recipe in self.recipes}
        return {"steering": True, "version": VERSION, "recipes": prints, "rebuilt": self.rebuilt}

    def _seat(self, shares: Sequence[Share]) -> None:
        """A slot for each request of the pass. There are as many as a pass can have requests; those that wait give
        theirs up, and are read again."""
        here = {share.request for share in shares}
        for share in shares:
            row = self._rows.get(share.request)
            if row is None:
                row = self._rows[share.request] = _Row(Track.of(self.machine, share.asked.prompt))
            if row.slot < 0:
                if not self._free:
                    waits = next(own for name, own in self._rows.items() if name not in here and own.slot >= 0)
                    self._free.append(waits.slot)
                    waits.slot = waits.seen = -1
                row.slot = self._free.pop()

    def _steps(self, share: Share) -> bool:
        """Is it one token behind the prompt, that follows on what its slot has seen?"""
        follows = self._rows[share.request].seen == share.begin
        return follows and share.stop - share.start == 1 and share.begin >= len(share.asked.prompt)

    def _step(self, shares: Sequence[Share], input_ids: Tensor) -> tuple[Tensor, ...]:
        rows = [self._rows[share.request] for share in shares]
        counted = [share.begin >= row.counted for share, row in zip(shares, rows, strict=True)]
        for share, row in zip(shares, rows, strict=True):
            row.seen, row.counted = share.begin + 1, max(row.counted, share.begin + 1)
        numbers = torch.tensor(
            [[row.slot, s.start, s.asked.recipe] for row, s in zip(rows, shares, strict=True)], device=self.device
        )
        slots, place, recipe = numbers.unbind(1)
        strength = torch.tensor([share.asked.strength for share in shares], device=self.device)
        ids = input_ids[place].long()
        phase, thought, marked = self.slots.step(slots, ids)
        return place, recipe, strength, torch.tensor(counted, device=self.device), phase, thought, ids, marked

    def _read(self, share: Share) -> tuple[Tensor, ...]:
        """Of tokens that the host knows: a prompt's, or those that are computed anew."""
        row, end = self._rows[share.request], share.begin + share.stop - share.start
        if row.track.seen != share.begin:
            row.track = Track.of(self.machine, share.asked.prompt)
            row.track.read(_known(share, 0, share.begin))
            self.rebuilt += 1
        ids = _known(share, share.begin, end)
        told = row.track.read(ids)
        positions = np.arange(share.begin, end)
        counted, row.counted = positions >= row.counted, max(row.counted, end)
        self.slots.put([row.slot], [row.track.state])
        row.seen = end
        n = len(ids)
        place = torch.arange(share.start, share.stop)
        held = (torch.from_numpy(x) for x in (told.phase, told.thought, ids, told.marked))
        phase, thought, tokens, marked = held
        columns = (
            place, torch.full((n,), share.asked.recipe), torch.full((n,), share.asked.strength),
            torch.from_numpy(counted), phase, thought, tokens, marked,
        )  # fmt: skip
        return tuple(column.to(self.device) for column in columns)


def _known(share: Share, start: int, stop: int) -> np.ndarray:
    ids = np.asarray(share.known(stop), dtype=np.int64)[start:stop]
    if len(ids) != stop - start or (ids < 0).any():
        raise RuntimeError(
            f"thinksteer needs the tokens {start} to {stop} of the request {share.request}, and the host does not know "
            "them: its state was lost. This vLLM schedules in a way that the plugin does not know."
        )
    return ids
