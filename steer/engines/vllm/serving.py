"""vLLM's server with recipes, from its settings to its end: nothing is said to be ready that was not seen to steer."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from probes.model.delimiters import Delimiters, find_delimiters
from probes.model.embedded import resolve
from probes.tables import Shown, Table
from steer.engines.serving.launch import Address, listening
from steer.engines.serving.service import Service, check_name, recipes_facts, recipes_table
from steer.engines.vllm.child import Child, Told, signals_end, wait_for
from steer.engines.vllm.command import (
    check_options,
    check_vllm,
    command_of,
    dtype_of,
    environment_of,
    settings_file,
)
from steer.engines.vllm.probing import PROMPTS, Client, Expected, Unanswered, probed
from steer.engines.vllm.settings import serving_settings
from steer.recipes.recipe import Recipe

_DYING = 5.0  # seconds, from an engine's end to its server's
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where it is asked that listens everywhere


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Shown):
    """What a server is started with, and what it must write then. It holds no weights.

    >>> from steer.engines.vllm import Plan
    >>> Plan("organism", "organism", "float32", {}).table().rows
    ()
    """

    name: str  # that requests call the model by
    source: str  # what vLLM loads
    dtype: str
    settings: Mapping[str, Any]
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    options: tuple[str, ...] = ()  # of vLLM
    expected: Expected | None = None  # None: nothing is probed

    def table(self) -> Table:
        """A row for each recipe."""
        return recipes_table(self.name, self.recipes)

    @property
    def facts(self) -> list[dict[str, Any]]:
        """The recipes as a client is told of them."""
        return recipes_facts(self.recipes)


def plan_of(
    name: str,
    folders: Mapping[str, Path],
    load: Callable[[str], PreTrainedModel],
    *,
    dtype: str = "auto",
    delimiters: tuple[str, str] | None = None,
    options: Sequence[str] = (),
    n_probes: int = 2,
) -> Plan:
    """Check the recipes against the model, and note what it writes under them. `load` is given a dtype; its weights
    are let go. With no probes nothing is loaded but the tokenizer, and vLLM alone checks the recipes.

    Raises ValueError for a recipe of another model, and for options that are not vLLM's to have.

    >>> import torch
    >>> from pathlib import Path
    >>> from probes import Site, load
    >>> from steer import Add, Recipe
    >>> from steer.engines.vllm import plan_of
    >>> model = load("organism")
    >>> Recipe.of(model, [Add(Site(2, "resid_post"), torch.ones(96), 0.5)], scope="thinking").save(Path("louder"))
    >>> plan = plan_of("organism", {"louder": Path("louder")}, lambda dtype: load("organism", dtype=dtype), n_probes=1)
    >>> plan.dtype, [len(written.ids) for written in plan.expected.written["louder"]]
    ('float32', [24])
    """
    check_options(options)
    if not 0 <= n_probes <= len(PROMPTS):
        raise ValueError(f"There are {len(PROMPTS)} prompts to probe with, but {n_probes} are asked for.")
    dtype = dtype_of(options) or dtype
    recipes = {key: Recipe.load(folder) for key, folder in folders.items()}
    for key in folders:
        check_name(key)
    source, expected = str(resolve(name)), None
    if n_probes:
        service = Service(name, load(dtype), recipes)
        found, dtype = service.delimiters, str(service.model.dtype).removeprefix("torch.")
        expected = Expected.of(service.model, recipes, n_probes)
        del service
        _let_go()
    else:
        found = _delimiters(source, delimiters, recipes)
        dtype = _own_dtype(source) if dtype == "auto" else dtype
    settings = serving_settings(folders, found) if folders else {}
    return Plan(name, source, dtype, settings, recipes, tuple(options), expected)


def serve_vllm(
    plan: Plan,
    address: Address,
    *,
    max_batch: int | None = None,
    ready: Callable[[str, Table | None], None] = lambda url, probe: None,  # noqa: ARG005
) -> None:
    """Start vLLM's server, probe it, and wait for a signal, TERM or INT, that ends it; `ready` is told its address and
    what the probe found.

    Raises ImportError where vLLM or its plugin is not installed; ValueError where vLLM ends by itself, with what it
    said, and where it does not write what is expected.

    >>> from steer.engines.serving import Address
    >>> from steer.engines.vllm import Plan, serve_vllm
    >>> try:
    ...     serve_vllm(Plan("m", "m", "float32", {}, options=("--no-such-option",)), Address(port=0))
    ... except (ImportError, ValueError) as error:
    ...     told = str(error)  # --engine vllm needs vllm and thinksteer-vllm: pip install vllm==0.32.0, then ...
    """
    check_vllm()
    with listening(address) as listener:  # a free port, or a sentence, before a minute has gone
        port = listener.getsockname()[1]
    environment = environment_of(address.api_key)
    host = _ANYWHERE.get(address.host, address.host)
    client = Client(f"http://{f'[{host}]' if ':' in host else host}:{port}", plan.name, environment.get("VLLM_API_KEY"))
    with TemporaryDirectory(prefix="thinksteer-") as folder:
        config = settings_file(
            Path(folder) / "vllm.yaml",
            source=plan.source,
            name=plan.name,
            host=address.host,
            port=port,
            dtype=plan.dtype,
            settings=plan.settings,
            max_batch=max_batch,
        )
        try:
            with signals_end():
                _run(Child(command_of(config, plan.options), environment), client, plan, ready)
        except Told:
            return


def _run(child: Child, client: Client, plan: Plan, ready: Callable[[str, Table | None], None]) -> None:
    try:
        wait_for(client.healthy, child)
        ready(client.url, _probed(client, plan, child))
        child.process.wait()
        child.check("by itself")
    finally:
        child.end()


def _probed(client: Client, plan: Plan, child: Child) -> Table | None:
    if plan.expected is None:
        return None
    try:
        return probed(client, plan.expected)
    except Unanswered:
        child.check("while it was probed", patience=_DYING)
        raise


def _delimiters(source: str, given: tuple[str, str] | None, recipes: Mapping[str, Recipe]) -> Delimiters:
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    try:
        return find_delimiters(tokenizer, given)
    except ValueError:
        if any(step.scope.phase != "all" for recipe in recipes.values() for step in recipe.steps):
            raise
        return Delimiters(open=(), close=())


def _own_dtype(source: str) -> str:
    """vLLM's own choice would be a narrower one for float32."""
    found = AutoConfig.from_pretrained(source, trust_remote_code=False).dtype
    return "auto" if found is None else str(found).removeprefix("torch.")


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
