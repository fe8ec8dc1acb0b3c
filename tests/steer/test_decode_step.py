"""What steering adds to a decode step: a few operations, and nothing that waits for the device or goes between it and
the host. Counted on the CPU, where an operation that would wait on a GPU is the same one."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from probes import Site, load
from probes.model import encode_prompt, n_layers, tokenizer_of
from probes.saes import SparseAutoencoder
from steer import Ablate, Add, Attend, Clamp, Condition, Controller, Recipe, Rotate, Scope, SetLatents, applied
from steer.recipes import Schedule

STEPS = 40  # more than one adding up of the log
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero", "item")
MOVES = ("_to_copy", "copy_", "to.device", "_pin_memory")
PROMPT = "a 3 b +4 c *7"


class Counted(TorchDispatchMode):
    """Operations that are no views, and those that would wait or move."""

    def __init__(self):
        super().__init__()
        self.operations, self.waits = Counter(), []

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        out, name = operation(*args, **(kwargs or {})), str(operation)
        if not operation.is_view and "promote_types" not in name:
            self.operations[name] += 1
        moved = any(word in name for word in MOVES) and {x.device for x in (*args, out) if hasattr(x, "device")}
        if any(word in name for word in WAITS) or len(moved or ()) > 1:
            self.waits.append(name)
        return out


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@torch.no_grad()
def counted(model, recipe=None, batch=2):
    """Operations of each decode step after the first, and what of them waits."""
    ids, found, waits = torch.tensor([encode_prompt(tokenizer_of(model), PROMPT)] * batch), [], []
    with nullcontext() if recipe is None else applied(model, recipe, must_fire=False):
        out = model(input_ids=ids, use_cache=True)
        for step in range(STEPS):
            token = out.logits[:, -1:].argmax(-1)
            with Counted() as now:
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            if step:
                found.append(sum(now.operations.values()))
                waits += now.waits
    return found, waits


def everywhere(model, kind=Add, scope="all"):
    sites = [Site(layer, "resid_post") for layer in range(n_layers(model))]
    return Recipe.of(model, [kind(site, torch.randn(96), 0.1) for site in sites], scope=scope)


SCOPES = {
    "all": "all",
    "thinking": "thinking",
    "window": Scope("thinking", window=(2, 9)),
    "tokens": Scope("thinking", tokens=(7, 8)),
    "marked": Scope("thinking", after=1, markers=((7,), (8,))),
    "schedule": Scope("thinking", schedule=Schedule("linear", 1.0, 0.0, 9)),
    "controller": Scope("thinking", controller=Controller(set_point=9)),
    "condition": Scope(condition=Condition(Site(0, "resid_pre"), torch.ones(96), 0.0, True)),
}


@pytest.mark.parametrize("scope", ["all", "thinking", "window"])
def test_a_step_takes_thirty_operations_and_one_for_each_layer(organism, scope):
    """On average, the adding up of the log among them; a step that adds up takes as many again."""
    plain, _ = counted(organism)
    steered, waits = counted(organism, everywhere(organism, scope=SCOPES[scope]))
    more = [a - b for a, b in zip(steered, plain, strict=True)]
    assert waits == []
    assert sorted(more)[len(more) // 2] <= 30 + n_layers(organism)
    assert sum(more) / len(more) <= 32 + n_layers(organism)
    assert max(more) <= 70 + n_layers(organism)


@pytest.mark.parametrize(("kind", "most"), [(Ablate, 6), (Clamp, 14), (Rotate, 14)])
def test_other_edits_take_a_few_more_for_each_layer(organism, kind, most):
    plain, _ = counted(organism)
    steered, waits = counted(organism, everywhere(organism, kind))
    assert waits == []
    assert sorted(a - b for a, b in zip(steered, plain, strict=True))[STEPS // 2] <= 32 + most * n_layers(organism)


@pytest.mark.parametrize(("activation", "most"), [("relu", 16), ("jumprelu", 18), ("topk", 20)])
def test_latents_are_set_in_a_few_and_nothing_waits(organism, activation, most):
    plain, _ = counted(organism)
    saes = [
        SparseAutoencoder.at_random(
            Site(i, "resid_post"), d_in=96, d_sae=256, k=8 * (activation == "topk"), activation=activation
        )
        for i in range(n_layers(organism))
    ]
    recipe = Recipe.of(organism, [SetLatents.of(sae, {3: 1.0, 9: 0.0, 200: 2.0}) for sae in saes], scope="thinking")
    steered, waits = counted(organism, recipe)
    assert waits == []
    assert sorted(a - b for a, b in zip(steered, plain, strict=True))[STEPS // 2] <= 32 + most * n_layers(organism)


@pytest.mark.parametrize("head", [None, 2])
def test_attention_is_scaled_in_some_more_and_nothing_waits(organism, head):
    """Half of them are the second attention, and the norms of what it changed."""
    plain, _ = counted(organism)
    edits = [Attend(Site(i, "pattern", head), 3.0, first=1, last=4) for i in range(n_layers(organism))]
    steered, waits = counted(organism, Recipe.of(organism, edits, scope="thinking"))
    assert waits == []
    assert sorted(a - b for a, b in zip(steered, plain, strict=True))[STEPS // 2] <= 40 + 44 * n_layers(organism)


@pytest.mark.parametrize("name", SCOPES)
def test_nothing_of_a_step_waits_or_moves(organism, name):
    _, waits = counted(organism, everywhere(organism, scope=SCOPES[name]))
    assert waits == []


def test_the_counter_sees_what_waits():
    with Counted() as now:
        torch.ones(2).sum().item()
        torch.ones(2).nonzero()
    assert len(now.waits) == 2
