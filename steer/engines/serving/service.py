"""What is served: a model, its recipes by name, and what a request of them may be."""

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probes.generation._batch import end_ids
from probes.generation.sampling import Sampling
from probes.model.architectures import config_of
from probes.model.delimiters import Delimiters
from probes.model.loading import delimiters_if_any, delimiters_of, identity_of, tokenizer_of
from probes.model.positions import passes_rope_limit
from probes.model.tokens import encode_prompt
from probes.tables import Shown, Table
from steer.engines.serving.requests import Body, read_body
from steer.engines.serving.tickets import Asked, Refused
from steer.recipes.recipe import Recipe
from steer.runtime.calibration import scaled


@dataclass(frozen=True, eq=False, repr=False)
class Service(Shown):
    """A model under the name that requests call it by, with the recipes that they may name. Raises ValueError for a
    recipe of another model, or one whose scopes ask for a thinking that the model does not tell.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, Recipe
    >>> from steer.engines.serving import Service
    >>> model = load("organism")
    >>> recipe = Recipe.of(model, [Add(Site(2, "resid_post"), torch.ones(96), 0.5)], scope="thinking")
    >>> Service("organism", model, {"louder": recipe}).table().rows
    (('louder', 'add at L2.resid_post, scope thinking, strength 0.5'),)
    """

    name: str
    model: PreTrainedModel
    recipes: Mapping[str, Recipe]
    max_tokens: int = 4096
    _encoding: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        for name, recipe in self.recipes.items():
            check_name(name)
            recipe.check(self.model)
            if any(step.scope.phase != "all" for step in recipe.steps):
                delimiters_of(self.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self.model)

    @cached_property
    def delimiters(self) -> Delimiters:
        return delimiters_if_any(self.model)

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(end_ids(self.model))

    @cached_property
    def fingerprints(self) -> Mapping[str, str]:
        """Of each recipe."""
        return {name: recipe.fingerprint() for name, recipe in self.recipes.items()}

    @cached_property
    def facts(self) -> list[dict[str, Any]]:
        """The recipes as a client is told of them."""
        return recipes_facts(self.recipes, identity_of(self.model))

    @property
    def positions(self) -> int | None:
        """How many tokens a row may have, prompt and answer; None where the model does not say."""
        found = getattr(config_of(self.model), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    def table(self) -> Table:
        """A row for each recipe."""
        return recipes_table(self.name, self.recipes)

    def read(self, raw: bytes, *, chat: bool) -> tuple[Body, Asked]:
        """A request's body, and what it asks of the model. Raises Refused for what cannot be done."""
        body = read_body(raw, Sampling.of(self.model), chat=chat, served=self.name)
        self._check_recipe(body)
        prompt = self._encoded(body)
        limit = self._limit(len(prompt), body.max_tokens)
        alone = passes_rope_limit(self.model, len(prompt) + limit)
        sampling = replace(body.sampling, max_new_tokens=limit)
        return body, Asked(tuple(prompt), sampling, body.recipe, body.strength, alone)

    def _check_recipe(self, body: Body) -> None:
        if body.recipe is None:
            return
        if body.recipe not in self.recipes:
            known = f"Known: {', '.join(self.recipes)}." if self.recipes else "None was named when the server started."
            raise Refused(f"There is no recipe {body.recipe!r:.80}. {known}", parameter="thinksteer")
        if body.strength != 1:
            try:
                scaled(self.recipes[body.recipe], body.strength)
            except ValueError as error:
                raise Refused(str(error), parameter="thinksteer_strength") from error

    def _encoded(self, body: Body) -> list[int]:
        template = str(self.tokenizer.chat_template or "")
        if strange := [
            key for key in body.template if key in _OURS or not re.search(rf"\b{re.escape(key)}\b", template)
        ]:
            names = ", ".join(key[:60] for key in strange[:20])
            raise Refused(f"The chat template reads no {names}.", parameter="chat_template_kwargs")
        where = "messages" if body.chat else "prompt"
        try:
            with self._encoding:  # a tokenizer may hold settings while it writes
                found = encode_prompt(self.tokenizer, body.prompt, template=body.template if body.chat else "raw")
        except Exception as error:  # noqa: BLE001 - a template raises what it likes
            why = " ".join(str(error).split())
            raise Refused(f"The {where} cannot be written for this model: {why}", parameter=where) from error
        if not found:
            raise Refused(f"The {where} has no tokens.", parameter=where)
        return found

    def _limit(self, prompt: int, asked: int | None) -> int:
        """How many new tokens there may be."""
        room = self.max_tokens if self.positions is None else min(self.max_tokens, self.positions - prompt)
        if self.positions is not None and prompt >= self.positions:
            raise Refused(
                f"The prompt has {prompt:,} tokens, and the model has {self.positions:,} positions: at most "
                f"{self.positions - 1:,} fit, with one for an answer.",
                parameter="messages",
            )
        if asked is not None and asked > room:
            raise Refused(
                f"max_tokens is {asked:,}, but {room:,} fit: the prompt has {prompt:,} tokens, the model "
                f"{'any number of' if self.positions is None else f'{self.positions:,}'} positions, and this server "
                f"writes at most {self.max_tokens:,}.",
                parameter="max_tokens",
            )
        return room if asked is None else asked


def check_name(name: str) -> None:
    """Raise ValueError for what cannot be the name of a recipe."""
    if not name or not name.isprintable() or name.strip() != name:
        raise ValueError(f"{name!r} is no name of a recipe: give it letters that can be printed.")


def recipes_table(model: str, recipes: Mapping[str, Recipe]) -> Table:
    """A row for each recipe that is served with the model of this name."""
    rows = tuple((name, "; ".join(steps_of(recipe))) for name, recipe in recipes.items())
    return Table(("recipe", "steps"), rows, f"Served: {model}")


def recipes_facts(recipes: Mapping[str, Recipe], model: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """What a client is told of recipes for a model; for that which each was made on, if none is given."""
    return [
        {
            "name": name,
            "method": recipe.method,
            "steps": steps_of(recipe),
            "fingerprint": recipe.fingerprint(),
            "model": dict(recipe.model if model is None else model),
        }
        for name, recipe in recipes.items()
    ]


def steps_of(recipe: Recipe) -> list[str]:
    """A recipe's steps in words."""
    return [
        f"{kind} at {site}, scope {scope}, strength {strength:g}"
        for _, kind, site, scope, strength in recipe.table().rows
    ]


_OURS = (
    "conversation",
    "messages",
    "add_generation_prompt",
    "tokenize",
    "return_dict",
    "chat_template",
    "tools",
    "documents",
)
