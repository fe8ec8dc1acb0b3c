"""Each intervention in the table form of the vLLM plugin does what `steer.interventions` does, and no more."""

import random

import plugin  # noqa: F401 - the plugin's package becomes importable
import pytest
import torch
from families import build
from thinksteer_vllm.edits import edit_results, edit_stream, edit_whole, edited
from thinksteer_vllm.recipes import read_recipe
from thinksteer_vllm.settings import fingerprint
from thinksteer_vllm.tables import Tokens, places

from probes import Site
from probes.model.architectures import head_matrices
from steer import Ablate, Add, Clamp, Controller, Recipe, Rotate, Scale, Schedule, Scope, Step
from steer.runtime.gates import Gate

N, CPU = 9, torch.device("cpu")
WIDTHS = {"stream": 32, "z": 32, "head": 8}
SITE = Site(1, "resid_post")


def vector(seed=0, width=32):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "add": Add(SITE, vector(1), 2.5),
    "ablate": Ablate(SITE, vector(2), 0.7),
    "ablate to a target": Ablate(SITE, vector(2), 1.0, target=3.0),
    "scale": Scale(SITE, 0.4),
    "clamp": Clamp(SITE, vector(3), 0.9, low=-0.1, high=0.2),
    "clamp on one side": Clamp(SITE, vector(3), high=0.0),
    "rotate": Rotate(SITE, vector(4), 1.5),
}


def table(tmp_path, *interventions, dtype=torch.float32):
    """A recipe of these through its file, and its places."""
    model = build("llama")
    made = Recipe.of(model, interventions)
    made.save(tmp_path / "recipe")
    recipe = read_recipe("r", tmp_path / "recipe", fingerprint(tmp_path / "recipe"))
    return places([recipe], WIDTHS, dtype, CPU)


def tokens_of(touched, steps=1, multiple=1.0, strength=1.0):
    tokens = Tokens.of(steps, N + 4, CPU)
    for step in range(steps):
        tokens.rows[step, :N] = torch.where(touched, step + 1, 0)
        tokens.multiples[step, :N] = multiple
    tokens.strength[:N] = strength
    return tokens


def some():
    return torch.tensor([True, False, True, True, False, False, True, False, True])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kind_does_what_the_intervention_does(name, dtype, tmp_path):
    (place,) = table(tmp_path, KINDS[name], dtype=dtype).values()
    x, touched = torch.randn(N, 32, generator=torch.Generator().manual_seed(9)).to(dtype), some()
    new, told = edited(x, place, tokens_of(touched))
    assert told[:, 0].tolist() == touched.tolist()
    assert torch.equal(new[~touched], x[~touched])
    expected = KINDS[name](x)[touched]
    near = {"atol": 1e-6} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    assert torch.allclose(new[touched].float(), expected.float(), **near)
    assert (new[touched] - x[touched]).abs().amax() > 0.05


@pytest.mark.parametrize("name", KINDS)
def test_a_multiple_mixes_what_was_with_what_it_becomes(name, tmp_path):
    (place,) = table(tmp_path, KINDS[name]).values()
    x, touched = torch.randn(N, 32, generator=torch.Generator().manual_seed(8)), some()
    new, _ = edited(x, place, tokens_of(touched, multiple=-0.35))
    assert torch.allclose(new[touched], (x - 0.35 * (KINDS[name](x) - x))[touched], atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_a_strength_of_the_request_multiplies_that_of_the_step(name, tmp_path):
    from dataclasses import replace

    (place,) = table(tmp_path, KINDS[name]).values()
    x, touched = torch.randn(N, 32, generator=torch.Generator().manual_seed(7)), some()
    new, _ = edited(x, place, tokens_of(touched, strength=1.7))
    stronger = replace(KINDS[name], strength=1.7 * KINDS[name].strength)
    assert torch.allclose(new[touched], stronger(x)[touched], atol=2e-6)


def test_steps_at_one_site_follow_each_other_in_the_recipes_order(tmp_path):
    steps = list(KINDS.values())
    (place,) = table(tmp_path, *steps).values()
    x, touched = torch.randn(N, 32, generator=torch.Generator().manual_seed(6)), some()
    new, _ = edited(x, place, tokens_of(touched, len(steps)))
    for step in steps:
        x = x.where(~touched[:, None], step(x))
    assert torch.allclose(new, x, atol=3e-6)


def test_the_stream_is_edited_in_place_and_untouched_rows_keep_their_bits(tmp_path):
    (place,) = table(tmp_path, KINDS["ablate"]).values()
    made = torch.Generator().manual_seed(5)
    hidden, residual, touched = torch.randn(N, 32, generator=made), 100 * torch.randn(N, 32, generator=made), some()
    before, stream = (hidden.clone(), residual.clone()), hidden + residual
    edit_stream(hidden, residual, [place], tokens_of(touched))
    assert torch.equal(hidden[~touched], before[0][~touched])
    assert torch.equal(residual[~touched], before[1][~touched])
    assert torch.allclose((hidden + residual)[touched], KINDS["ablate"](stream)[touched], atol=1e-4)


def test_heads_are_edited_and_the_whole_of_z_before_them(tmp_path):
    edits = [
        Scale(Site(1, "z", head=2), 0.0),
        Add(Site(1, "z"), vector(1), 1.0),
        Add(Site(1, "z", head=0), vector(2, 8)),
    ]
    at = list(table(tmp_path, *edits).values())
    x, touched = torch.randn(N, 32), some()
    new = x.clone()
    edit_whole(new, at, tokens_of(touched, 3))
    expected = x + vector(1)
    expected[:, 16:24] = 0
    expected[:, :8] += vector(2, 8)
    assert torch.allclose(new[touched], expected[touched], atol=1e-6)
    assert torch.equal(new[~touched], x[~touched])


def test_a_heads_result_is_edited_in_what_is_written(tmp_path):
    from dataclasses import replace

    model = build("llama")
    edit = Ablate(Site(1, "result", head=2), vector(3))
    (place,) = table(tmp_path, edit).values()
    place = replace(place, matrix=head_matrices(model, 1)[:, 2].detach().float().T)
    z, written, touched = torch.randn(N, 32), torch.randn(N, 32), some()
    new = written.clone()
    edit_results(z, new, [place], tokens_of(touched))
    write = z[:, 16:24] @ place.matrix
    assert torch.allclose(new[touched], (written + edit(write) - write)[touched], atol=1e-5)
    assert torch.equal(new[~touched], written[~touched])


SCOPES = {
    "phase": Scope("answer"),
    "tokens": Scope("thinking", tokens=(3, 7, 11)),
    "tokens anywhere": Scope("all", tokens=(3, 7, 11)),
    "marker": Scope("thinking", after=2, markers=((4,), (5, 6))),
    "another marker": Scope("thinking", after=1, markers=((8,),), window=(2, None)),
    "window": Scope("thinking", window=(1, 6)),
    "linear": Scope("thinking", schedule=Schedule("linear", start=1.0, end=-0.5, over=7)),
    "cosine": Scope("thinking", schedule=Schedule("cosine", start=0.2, end=1.5, over=5)),
    "step": Scope("thinking", schedule=Schedule("step", start=1.0, end=0.25, over=4)),
    "controller": Scope("thinking", controller=Controller(set_point=9.0)),
    "both": Scope("thinking", controller=Controller(set_point=9.0, gain=2.0), window=(2, 30),
                  schedule=Schedule("linear", start=1.0, end=0.0, over=20)),
}  # fmt: skip


def test_every_scope_touches_what_its_gate_touches_by_the_same_multiple(tmp_path):
    from thinksteer_vllm.machine import Delimiters, Track
    from thinksteer_vllm.scopes import Scopes
    from thinksteer_vllm.settings import Settings

    from probes.model import Delimiters as Ours
    from probes.thinking import Clock

    model, rng = build("llama"), random.Random(1)
    steps = [Step(KINDS["add"], scope) for scope in SCOPES.values()]
    Recipe(tuple(steps), Recipe.of(model, []).model).save(tmp_path / "recipe")
    recipe = read_recipe("r", tmp_path / "recipe", "")
    settings = Settings({"r": recipe}, Delimiters((1,), (2,), (9,), (10,)))
    scopes = Scopes.of([recipe], settings.markers, CPU)
    for _ in range(60):
        ids = [rng.choice([1, 2, 9, 10, *[3, 4, 5, 6, 7, 8, 11, 12] * 3]) for _ in range(rng.randint(5, 60))]
        told = Track.of(settings.machine, ids).read(ids)
        where = tuple(torch.from_numpy(x) for x in (told.phase, told.thought, told.marked))
        rows, multiples = scopes.touch(torch.zeros(len(ids), dtype=torch.long), (*where, torch.tensor(ids)))
        clock = Clock(Ours((1,), (2,), (9,), (10,)), markers=tuple(settings.markers))
        phases = clock.advance(torch.tensor([ids]), None, 0)
        for k, scope in enumerate(SCOPES.values()):
            gate = Gate(scope, clock.markers)
            gate.begin(phases, torch.tensor([ids]))
            assert (rows[:, k] > 0).tolist() == gate.mask[0].tolist()
            if gate.multiple is not None:
                own = gate.mask[0]
                assert torch.allclose(multiples[own, k], gate.multiple[0][own], atol=1e-6)
            else:
                assert (multiples[:, k] == 1).all()
