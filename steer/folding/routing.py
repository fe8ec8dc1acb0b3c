"""Routing edits written into weights: an expert's own matrix, or the bias its router chooses by."""

from torch import Tensor
from transformers import PreTrainedModel

from probes.model.architectures import block_of, config_of, row_at
from probes.model.routers import block_at
from steer.folding.draft import Draft, NotFoldable
from steer.interventions.routing import Forbid, Reinforce, RoutingEdit
from steer.runtime.rerouting import BIAS, FAR


def fold_routing(model: PreTrainedModel, edit: RoutingEdit, draft: Draft) -> None:
    """Raises `NotFoldable` where no change of weights is equal.

    A routing weight multiplies the output of its expert, so that reinforcement is the expert's `down_proj`, and its
    bias, times the strength: in the families whose row names their experts' matrices.
    """
    if isinstance(edit, Reinforce):
        _fold_reinforce(model, edit, draft)
    elif isinstance(edit, Forbid):
        _fold_forbid(model, edit, draft)
    else:
        raise NotFoldable(f"{edit.site} is forced, and no weights make a router choose an expert for every token.")


def _fold_reinforce(model: PreTrainedModel, edit: Reinforce, draft: Draft) -> None:
    row, family = row_at(model, edit.site.layer), config_of(model).model_type
    if edit.renormalise:
        raise NotFoldable(
            f"{edit.site} is reinforced and renormalised, which changes the other experts token by token."
        )
    named = dict(block_of(model, edit.site.layer).named_parameters())
    stacks = [path for path in row.mlp_writers if path.endswith("experts.down_proj") and path in named]
    if not stacks:
        raise NotFoldable(
            f"{edit.site} has no matrix that a row names for {family}: keep it as a run-time intervention."
        )
    for path in (*stacks, *(bias for bias in row.expert_biases if bias in named)):
        draft[named[path]][edit.site.expert] *= edit.strength


def _fold_forbid(model: PreTrainedModel, edit: Forbid, draft: Draft) -> None:
    """A bias so far down that the router never gets to the expert; the weights of the others do not hang on it."""
    router = block_at(model, edit.site.layer).router
    bias: object = getattr(router, BIAS, None)
    if not isinstance(bias, Tensor):
        bias = dict(router.named_parameters()).get("bias")
    if not isinstance(bias, Tensor):
        raise NotFoldable(
            f"{edit.site} is forbidden, but the router of {config_of(model).model_type} has no bias to choose by: keep "
            "it as a run-time intervention."
        )
    draft[bias][edit.site.expert] -= FAR
