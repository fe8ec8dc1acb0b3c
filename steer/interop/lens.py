"""A recipe as hooks of TransformerLens, by its names."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from probes.model.architectures import attn_gain, has_site, head_matrices, multiplier_of, row_at
from probes.model.hooks import edit_added, edit_head, edit_written
from probes.model.sites import Site
from steer.interop._run import Run
from steer.recipes.recipe import Recipe
from steer.runtime.edits import Edit, Edits, chained
from steer.runtime.firelog import FireLog

Hook = tuple[str, Callable[[Tensor, Any], Tensor | None]]


def lens_hooks(model: PreTrainedModel, recipe: Recipe) -> tuple[list[Hook], FireLog]:
    """What a recipe does, as `fwd_hooks` of the TransformerBridge that `model` was loaded from, and the log of what
    they touch.

    For `bridge.run_with_hooks(ids, fwd_hooks=hooks)`, `bridge.hooks(fwd_hooks=hooks)` and `bridge.generate` inside of
    it. TransformerLens tells its hooks neither the attention mask nor the cache. So rows are taken to have no pads, and
    a pass of one token to go on with the one before; any other begins anew. Raises ValueError where the recipe was
    made on another model, or does what hooks by these names cannot: edit attention or routing, or add behind a norm
    what a head writes. `steer.applied` around a run of the bridge has none of these limits.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, Recipe
    >>> from steer.interop import lens_hooks
    >>> model = load("organism")
    >>> hooks, log = lens_hooks(model, Recipe.of(model, [Add(Site(2, "resid_post"), torch.ones(96), 0.05)]))
    >>> [name for name, _ in hooks]
    ['embed.hook_in', 'blocks.2.hook_resid_post', 'unembed.hook_out']
    """
    recipe.check(model)
    run = Run(model, recipe, "a hook of TransformerLens")
    edits = Edits(model, run.log)

    def begin(ids: Tensor, hook: Any) -> None:  # noqa: ARG001 - TransformerLens gives both, the second by its name
        run.begin(ids, n_past=run.seen if ids.shape[1] == 1 else 0)

    def end(logits: Tensor, hook: Any) -> None:  # noqa: ARG001
        run.log.end_pass()

    hooks: list[Hook] = [("embed.hook_in", begin)]
    for scope, gate in run.gates.items():
        if scope.gauge is not None:
            hooks.append((scope.gauge.transformer_lens, _seeing(gate.see)))
    for site, steps in run.sites():
        edit = chained([edits.of(number, step, run.gates[step.scope]) for number, step in steps])
        hooks += _hooks_at(model, site, edit)
    return [*hooks, ("unembed.hook_out", end)], run.log


def _hooks_at(model: PreTrainedModel, site: Site, edit: Edit) -> list[Hook]:
    if site.name in ("attn_out", "mlp_out", "result") and multiplier_of(model) != 1:
        raise ValueError(f"{site} is scaled before it is added to the stream, and TransformerLens shows it unscaled.")
    if site.name == "resid_mid":
        return _on_resid_mid(model, site, edit)
    if site.name == "result":
        return _on_result(model, site, edit)
    if site.name == "z":
        return [(site.transformer_lens, _on_z(site.head, edit))]
    return [(site.transformer_lens, lambda x, hook: edit(x))]  # noqa: ARG005


def _seeing(see: Callable[[Tensor], None]) -> Callable[[Tensor, Any], None]:
    return lambda x, hook: see(x)  # noqa: ARG005


def _on_z(head: int | None, edit: Edit) -> Callable[[Tensor, Any], Tensor | None]:
    """`z` has a dimension for the heads there."""

    def change(z: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        whole = z.flatten(-2)
        new = edit(whole) if head is None else edit_head(whole, head, z.shape[-2], edit)
        return None if new is None else new.unflatten(-1, z.shape[-2:])

    return change


def _on_resid_mid(model: PreTrainedModel, site: Site, edit: Edit) -> list[Hook]:
    """Made to what attention adds, as their hook there reaches the MLP alone."""
    if row_at(model, site.layer).normed or not has_site(model, site.layer, "attn_out"):
        raise ValueError(f"{site} cannot be edited by hooks of TransformerLens: what attention adds is not shown.")
    before: list[Tensor] = []

    def keep(x: Tensor, hook: Any) -> None:  # noqa: ARG001
        before[:] = [x]

    def change(added: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        return edit_added(before[0], added, edit)

    pre, out = Site(site.layer, "resid_pre"), Site(site.layer, "attn_out")
    return [(pre.transformer_lens, keep), (out.transformer_lens, change)]


def _on_result(model: PreTrainedModel, site: Site, edit: Edit) -> list[Hook]:
    if attn_gain(model, site.layer) is not None:
        raise ValueError(f"{site} is added behind a norm, where hooks of TransformerLens do not show what a head adds.")
    matrix, kept = head_matrices(model, site.layer)[:, site.head].detach().float().T, list[Tensor]()

    def keep(z: Tensor, hook: Any) -> None:  # noqa: ARG001
        kept[:] = [z[..., site.head, :]]

    def change(out: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        return edit_written(kept[0], matrix, out, edit)

    z, out = Site(site.layer, "z"), Site(site.layer, "attn_out")
    return [(z.transformer_lens, keep), (out.transformer_lens, change)]
