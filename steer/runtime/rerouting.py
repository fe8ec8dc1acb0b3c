"""Routing edits at work: what a layer's experts get instead of what its router chose."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from probes.model.architectures import config_of
from probes.model.routers import Routing, SparseBlock, block_at
from steer.interventions.routing import Forbid, Force, Reinforce, RoutingEdit
from steer.runtime.firelog import FireLog
from steer.runtime.gates import Gate

MARGIN, FAR = 0.01, 1e4  # of SteerMoE's logit; of a bias, which sigmoid scores cannot outweigh
BIAS = "e_score_correction_bias"


class SelectionRule:
    """A router's own rule, from logits to weights and ids: its own code, with the identity for its matrix."""

    def __init__(self, block: SparseBlock) -> None:
        self.block, n = block, block.n_experts
        self.twin = copy.deepcopy(block.router)
        own = block.router.get_parameter("weight")
        self.twin.weight = torch.nn.Parameter(torch.eye(n, dtype=own.dtype, device=own.device), requires_grad=False)
        setattr(self.twin, "hidden_dim", n)
        if isinstance(getattr(self.twin, "bias", None), Tensor):
            zeros = torch.zeros_like(block.router.get_parameter("bias"))
            self.twin.bias = torch.nn.Parameter(zeros, requires_grad=False)
        self.holder = next(
            (part for part in self.twin.modules() if isinstance(getattr(part, BIAS, None), Tensor)), None
        )
        self.own = torch.zeros(n) if self.holder is None else getattr(self.holder, BIAS).detach().reshape(n)
        for held in () if self.holder is None else (self.holder._parameters, self.holder._buffers):
            held.pop(BIAS, None)  # from here on a tensor with a row for each token

    @torch.no_grad()
    def __call__(
        self,
        logits: Float[Tensor, "tokens experts"],
        forced: Bool[Tensor, "tokens experts"],
        forbidden: Bool[Tensor, "tokens experts"],
    ) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
        if self.holder is not None:
            setattr(self.holder, BIAS, self.own + FAR * (forced.to(self.own.dtype) - forbidden.to(self.own.dtype)))
        else:
            logits = logits.where(~forced, logits.amax(-1, keepdim=True) + MARGIN)
            logits = logits.masked_fill(forbidden, torch.finfo(logits.dtype).min)
        _, weights, ids = type(self.twin).forward(self.twin, logits)
        return weights, ids

    @torch.no_grad()
    def check(self, model: PreTrainedModel, forced: Sequence[int], forbidden: Sequence[int]) -> None:
        """Raise ValueError, naming the family, where the rule cannot be followed, or does not do what it is to do."""
        router, weight = self.block.router, self.block.router.get_parameter("weight")
        unknown = f"The routing rule of {config_of(model).model_type} cannot be re-run from its logits."
        noise = torch.randn(16, weight.shape[1], generator=torch.Generator().manual_seed(0))
        try:
            logits, weights, ids = type(router).forward(router, noise.to(weight.device, weight.dtype))
            never = torch.zeros_like(logits, dtype=torch.bool)
            same = self(logits, never, never)
        except TypeError as error:  # a router that wants more than its input
            raise ValueError(unknown) from error
        if not (torch.equal(same[0], weights) and torch.equal(same[1], ids)):
            raise ValueError(unknown)
        wanted, unwanted = never.clone(), never.clone()
        wanted[:, list(forced)] = True
        unwanted[:, list(forbidden)] = True
        _, found = self(logits, wanted, unwanted)
        routed_edit = never.scatter(1, found, True)
        if not routed_edit[wanted].all() or routed_edit[unwanted].any():
            raise ValueError(
                f"{config_of(model).model_type} cannot choose {len(forced)} forced experts and none of "
                f"{len(forbidden)} forbidden ones in one layer: it takes {self.block.k} of {self.block.n_experts}."
            )


class Routed:
    """The tokens of a gate's pass at which a routing edit found its expert: a gate of its own for the log."""

    multiple = None

    def __init__(self, gate: Gate) -> None:
        self.gate, self.mask = gate, torch.zeros(0, 0, dtype=torch.bool)


class Rerouting:
    """All routing edits of one layer: forced and forbidden experts first, then reinforcement, in the recipe's order."""

    def __init__(
        self, model: PreTrainedModel, layer: int, edits: Sequence[tuple[int, RoutingEdit, Routed]], log: FireLog
    ) -> None:
        self.edits, self.log = edits, log
        self.forcing = [(number, edit, gate) for number, edit, gate in edits if not isinstance(edit, Reinforce)]
        self.rule: SelectionRule | None = None
        if self.forcing:
            self.rule = SelectionRule(block_at(model, layer))
            at = {kind: [_expert(e) for _, e, _ in self.forcing if isinstance(e, kind)] for kind in (Force, Forbid)}
            if both := set(at[Force]) & set(at[Forbid]):
                raise ValueError(f"Expert {min(both)} of layer {layer} is both forced and forbidden.")
            self.rule.check(model, at[Force], at[Forbid])
        for _, edit, routed_edit in self.forcing:
            if routed_edit.gate.scope.varies:
                raise ValueError(f"A {edit.kind} at {edit.site} is done or not: its scope can have no schedule.")

    def __call__(self, routing: Routing) -> Routing:
        before, now = routing, routing
        if self.rule is not None:
            now = self._forced(routing, self.rule)
        norm = torch.linalg.vector_norm(before.weights.float(), dim=-1)
        had, has = _held(before), _held(now)
        for number, edit, routed_edit in self.edits:
            expert, scope = _expert(edit), routed_edit.gate.mask.to(now.ids.device)
            if isinstance(edit, Reinforce):
                new = _reinforced(now, edit, routed_edit.gate, scope)
                change = torch.linalg.vector_norm((new.weights - now.weights).float(), dim=-1)
                routed_edit.mask, now = scope & has[..., expert], new
            else:
                routed_edit.mask = scope & (had[..., expert] != has[..., expert])
                change = torch.linalg.vector_norm(now.dense - before.dense, dim=-1)
            self.log.note_norms(number, norm, change)
        return now

    def _forced(self, routing: Routing, rule: SelectionRule) -> Routing:
        forced, forbidden = (torch.zeros_like(routing.logits, dtype=torch.bool) for _ in range(2))
        for _, edit, routed_edit in self.forcing:
            into = forced if isinstance(edit, Force) else forbidden
            into[..., _expert(edit)] |= routed_edit.gate.mask.to(into.device)
        changes = (forced | forbidden).any(-1, keepdim=True)
        flat = (part.flatten(0, 1) for part in (routing.logits, forced, forbidden))
        weights, ids = (part.reshape(routing.ids.shape) for part in rule(*flat))
        return replace(routing, weights=weights.where(changes, routing.weights), ids=ids.where(changes, routing.ids))


def _reinforced(routing: Routing, edit: Reinforce, gate: Gate, scope: Bool[Tensor, "batch new"]) -> Routing:
    old = routing.weights
    new = torch.where(routing.ids == _expert(edit), old * edit.strength, old)
    if edit.renormalise:
        total = new.sum(-1, keepdim=True)
        new = torch.where(total > 0, new * (old.sum(-1, keepdim=True) / total), new)
    if gate.scope.varies:
        new = old + gate.weight(old.dtype, old.device) * (new - old)
    return replace(routing, weights=new.where(scope[..., None], old))


def _held(routing: Routing) -> Bool[Tensor, "batch new experts"]:
    return torch.zeros_like(routing.logits, dtype=torch.bool).scatter(-1, routing.ids, True)


def _expert(edit: RoutingEdit) -> int:
    assert edit.site.expert is not None
    return edit.site.expert
