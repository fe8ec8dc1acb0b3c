"""Hooks at sites and inputs: the only file that knows a module may return a tuple."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.model.architectures import block_of, has_site, head_matrices, multiplier_of, n_heads, row_at, tap_of
from probes.model.passes import Hook, Name, Side, all_hooked, hooked, named_edit, rows_of, shape_of
from probes.model.positions import Length, real_tokens
from probes.model.sites import Site
from probes.rows import Rows

Edit = Callable[[Float[Tensor, "batch pos width"]], Float[Tensor, "batch pos width"] | None]
See = Callable[[Int[Tensor, "batch new"], Int[Tensor, "batch total"] | None, int, Rows | None], None]


@contextmanager
def attached(model: nn.Module, site: Site, edit: Edit, *, name: Name | None = None) -> Iterator[None]:
    """While open, `edit` sees the activation at `site`, and replaces it if it returns a tensor.

    At a site with a head, `edit` sees that head alone: `width` is d_head at `z`, d_model at `result`. A stream that is
    edited stays edited: at `resid_mid`, where a hook on the norm would reach the MLP alone, the change is made to what
    attention adds, or the MLP. `name` tells what is done, for a store of completions. Raises ValueError where the layer
    has no such site, IndexError where layer or head is out of range.

    >>> from probes import Site, attached, generate, load
    >>> model = load("organism")
    >>> (plain,) = generate(model, ["a 3 b +4 c *7"])
    >>> with attached(model, Site(0, "mlp_out"), lambda x: 0 * x):  # what the first MLP adds is taken away
    ...     (edited,) = generate(model, ["a 3 b +4 c *7"])
    >>> plain.thinking, edited.thinking
    ('Okay a =3 b +4 =7 c *7 =9', 'Okay a h b +4 =9 c *7 =3 d *7 =9')
    """
    with all_attached(model, {site: edit}, name=name):
        yield


@contextmanager
def all_attached(model: nn.Module, edits: Mapping[Site, Edit], *, name: Name | None = None) -> Iterator[None]:
    """As `attached`, for many sites in the order in which they are computed."""
    mids = [site for site in edits if site.name == "resid_mid"]
    taps = (_at_tap(model, site, edit) for site, edit in edits.items() if site not in mids)
    with named_edit(model, name), all_hooked(model, taps), ExitStack() as stack:
        for site in mids:
            stack.enter_context(_on_resid_mid(model, site, edits[site]))
        yield


@contextmanager
def hook_site(model: nn.Module, site: Site, see: Callable[[Tensor], None]) -> Iterator[None]:
    """While open, `see` gets the activation `[batch pos width]` at `site`, where the family's row says it is."""
    with _on_tap(model, site, see):
        yield


@contextmanager
def hook_sites(model: nn.Module, sees: Mapping[Site, Callable[[Tensor], None]]) -> Iterator[None]:
    """As `hook_site`, for many sites."""
    with all_hooked(model, (_at_tap(model, site, see) for site, see in sees.items())):
        yield


@contextmanager
def _on_resid_mid(model: nn.Module, site: Site, edit: Edit) -> Iterator[None]:
    tap_of(model, site)  # refused where attention and MLP run in parallel
    row, before = row_at(model, site.layer), list[Tensor]()
    if row.normed:  # what reads the stream is all that does
        with _on_tap(model, site, edit):
            yield
        return
    if not has_site(model, site.layer, "attn_out"):
        with _on_mid_and_mlp(model, site, edit):
            yield
        return

    def edit_out(added: Tensor) -> Tensor | None:
        return edit_added(before.pop(), added, edit)

    with (
        _on_tap(model, Site(site.layer, "resid_pre"), before.append),
        _on_tap(model, Site(site.layer, "attn_out"), edit_out),
    ):
        yield


@contextmanager
def _on_mid_and_mlp(model: nn.Module, site: Site, edit: Edit) -> Iterator[None]:
    """The change is made to what the MLP reads, and to what it adds."""
    changes: list[Tensor | None] = []

    def edit_mid(mid: Tensor) -> Tensor | None:
        new = edit(mid)
        changes.append(None if new is None else new - mid)
        return new

    def add_change(added: Tensor) -> Tensor | None:
        change = changes.pop()
        return None if change is None else added + change

    with _on_tap(model, site, edit_mid), _on_tap(model, Site(site.layer, "mlp_out"), add_change):
        yield


@contextmanager
def _on_tap(model: nn.Module, site: Site, edit: Edit) -> Iterator[None]:
    with all_hooked(model, [_at_tap(model, site, edit)]):
        yield


def _at_tap(model: nn.Module, site: Site, edit: Edit) -> tuple[nn.Module, Hook, Side, str]:
    """Where `site` is, and what edits it there, as a hook of torch."""
    module, tap = tap_of(model, site)
    matrix = head_matrices(model, site.layer)[:, site.head].float().T if site.name == "result" else None
    heads = 0 if site.head is None else n_heads(model, site.layer)
    scale = multiplier_of(model) if site.name in ("attn_out", "mlp_out") else 1.0
    overwritten = site.name in row_at(model, site.layer).overwritten

    def scaled(value: Tensor) -> Tensor | None:
        new = edit(value * scale)  # what is added to the stream
        return None if new is None else new / scale

    whole = edit if scale == 1.0 else scaled
    if site.head is not None:
        whole = partial(edit_head, head=site.head, heads=heads, edit=edit)

    def edited(value: Tensor) -> Tensor | None:
        if value.dim() == 2 and len(value) == prod(shape := shape_of(model)):  # rows one after another
            new = whole(value.unflatten(0, shape))
            return None if new is None else new.flatten(0, 1)
        return whole(value.clone() if overwritten else value)

    def before(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        new = edited(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        new = edited(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def after_head(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        assert matrix is not None
        return edit_written(args[0].unflatten(-1, (heads, -1))[..., site.head, :], matrix, output, edit)

    at_output: Hook = after_head if site.name == "result" else after
    return module, before if tap.side == "input" else at_output, tap.side, str(site)


def edit_added(pre: Tensor, added: Tensor, edit: Edit) -> Tensor | None:
    """What is to be added to `pre` so that the sum is as `edit` makes it; what it does not change stays to the bit."""
    mid = pre + added
    new = edit(mid)
    return None if new is None else torch.where(new == mid, added, new - pre)


def edit_written(z: Tensor, matrix: Tensor, output: Tensor, edit: Edit) -> Tensor | None:
    """`output` with what a head writes to it, `matrix` times its `z`, as `edit` makes that."""
    write = z.float() @ matrix.to(z.device)  # an offloaded one was read elsewhere
    new = edit(write)
    return None if new is None else output + (new - write).to(output.dtype)


def edit_head(whole: Tensor, head: int, heads: int, edit: Edit) -> Tensor | None:
    """`whole` with one head of it as `edit` makes it."""
    split = whole.unflatten(-1, (heads, -1))
    new = edit(split[..., head, :])
    if new is None:
        return None
    split = split.clone()
    split[..., head, :] = new
    out: Tensor | None = split.flatten(-2)
    return out


@contextmanager
def captured(model: nn.Module, sites: Iterable[Site]) -> Iterator[dict[Site, Tensor]]:
    """While open, keeps the latest activation `[batch pos width]` at each site.

    Of a head where the site names one: `width` is as at `attached`. Raises as `attached` does.

    >>> import torch
    >>> from probes import Site, captured, load
    >>> from probes.model import encode_prompt, tokenizer_of
    >>> model = load("organism")
    >>> ids = torch.tensor([encode_prompt(tokenizer_of(model), "a 3 b +4")])
    >>> with captured(model, [Site(1, "resid_post"), Site(1, "z", head=3)]) as cache, torch.no_grad():
    ...     _ = model(ids)
    >>> {str(site): tuple(x.shape) for site, x in cache.items()}
    {'L1H3.z': (1, 6, 16), 'L1.resid_post': (1, 6, 96)}
    """
    cache: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], None]:
        return lambda x: cache.update({site: x.detach()})

    with hook_sites(model, {site: keep(site) for site in sites}):
        yield cache


@contextmanager
def hook_inputs(model: nn.Module, see: See) -> Iterator[None]:
    """While open, `see` gets each forward pass' new token ids, its attention mask, the cached length, and which rows of
    their run they are, where that is known.

    Beam search is refused: it swaps the rows of a cache, and whoever follows them would not know.
    """

    length = Length()

    def before(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise ValueError("A scope reads token ids, but the model was called with inputs_embeds.")
        cache = next((c for name in ("past_key_values", "cache_params") if (c := kwargs.get(name)) is not None), None)
        if cache is not None:
            cache.reorder_cache = _refuse_beams
        n_past = length.of(cache, ids.shape[1])
        see(ids, real_tokens(kwargs.get("attention_mask"), ids, n_past), n_past, rows_of(model))

    with hooked(model, model, before, side="input", place="the model's input"):
        yield


def _refuse_beams(*_: Any) -> None:
    raise ValueError(
        "A scope cannot follow beam search, which swaps rows between steps: use sampling or greedy search."
    )


class _Reached(Exception):
    """The last layer asked for has run."""


@torch.no_grad()
def forward_through(model: nn.Module, layer: int, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Run blocks 0 to `layer` for the hooks that are attached; neither later blocks nor logits are computed."""

    def stop(_module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        raise _Reached

    with suppress(_Reached), hooked(model, block_of(model, layer), stop, side="output", place=f"block {layer}"):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
