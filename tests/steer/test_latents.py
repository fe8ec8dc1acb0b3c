"""Latents are set to what is asked, and nothing else of an activation moves; a recipe carries all that it needs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from probes import Sampling, Site, captured, generate, load
from probes.model import encode_prompt, tokenizer_of
from probes.saes import SparseAutoencoder
from steer import NotFoldable, Recipe, SetLatents, applied, folded
from steer.recipes import Scope

SITE = Site(2, "resid_post")
KINDS = ("relu", "jumprelu", "topk")
UNITS = ("none", "layer", "length")


@pytest.fixture(scope="module")
def organism():
    return load("organism")


def sae_of(activation="relu", normalisation="none", *, d_in=96, d_sae=160, seed=0):
    numbers = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=numbers)

    return SparseAutoencoder(
        SITE, drawn(d_in, d_sae) / 10, drawn(d_sae) / 4, drawn(d_sae, d_in), drawn(d_in), activation,
        drawn(d_sae).abs() / 4 if activation == "jumprelu" else None, 24 if activation == "topk" else 0,
        centred=True, normalisation=normalisation, scale=0.5 if normalisation == "none" else 3.0,
    )  # fmt: skip


X = 4 * torch.randn(5, 3, 96, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalisation", UNITS)
@pytest.mark.parametrize("activation", KINDS)
def test_nothing_is_changed_by_a_strength_of_zero_or_by_the_own_value(activation, normalisation, dtype):
    sae, x = sae_of(activation, normalisation), X.to(dtype)
    assert torch.equal(SetLatents.of(sae, {3: 9.0, 50: -2.0}, strength=0.0)(x), x)
    one = x[0, 0]
    f = sae.encode(one.float())
    latents = [int(i) for i in f.argsort(descending=True)[:2]]
    values = sae.encode_at(one.float(), latents)
    own = SetLatents.of(sae, {i: float(value) for i, value in zip(latents, values, strict=True)})
    assert torch.equal(own(one), one)


@pytest.mark.parametrize("normalisation", UNITS)
@pytest.mark.parametrize("activation", KINDS)
def test_the_change_is_the_formula_s_in_the_model_s_units(activation, normalisation):
    sae = sae_of(activation, normalisation)
    latents, targets = [5, 17, 90], [4.0, 0.0, -1.5]
    new = SetLatents.of(sae, dict(zip(latents, targets, strict=True)), strength=0.7)(X)
    f = sae.encode(X)
    asked = f.clone()
    asked[..., latents] = torch.tensor(targets)
    want = X + 0.7 * (sae.decode(asked, X) - sae.decode(f, X))
    torch.testing.assert_close(new, want, rtol=1e-4, atol=1e-4)
    change = (new - X).flatten(0, 1)
    rest = change - change @ torch.linalg.pinv(sae.W_dec[latents]) @ sae.W_dec[latents]
    assert float(rest.norm()) < 1e-4 * float(change.norm())


@pytest.mark.parametrize("activation", KINDS)
def test_ablated_is_a_target_of_zero(activation):
    sae = sae_of(activation)
    torch.testing.assert_close(SetLatents.ablating(sae, [4, 9])(X), SetLatents.of(sae, {4: 0.0, 9: 0.0})(X))


def test_several_are_set_by_one_encoding():
    """As they were before any was set: not one after another."""
    sae = sae_of()
    both = SetLatents.of(sae, {5: 4.0, 17: 2.0})(X) - X
    each = [SetLatents.of(sae, {latent: target})(X) - X for latent, target in ((5, 4.0), (17, 2.0))]
    torch.testing.assert_close(both, each[0] + each[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", KINDS)
def test_a_recipe_goes_through_its_files(organism, activation, tmp_path):
    made = SetLatents.of(sae_of(activation), {5: 4.0, 17: 0.0}, strength=0.5)
    Recipe.of(organism, [made], scope=Scope("thinking")).save(tmp_path / "r")
    again = Recipe.load(tmp_path / "r").steps[0].intervention
    assert isinstance(again, SetLatents)
    assert (again.kind, again.site, again.strength, again.k) == (made.kind, made.site, made.strength, made.k)
    assert torch.equal(again(X), made(X))
    size = (tmp_path / "r" / "recipe.safetensors").stat().st_size
    assert (size < 8_000) == (activation != "topk")  # two columns and rows, not an autoencoder


@pytest.mark.parametrize(("name", "damage", "sentence"), [
    ("0.W_dec", lambda x: x[:1], "W_dec"),
    ("0.latents", lambda x: x + 1000, "sets latents that it does not read"),
    ("0.W_enc", lambda x: x / 0, "W_enc of the set latents at L2.resid_post holds NaN"),
    ("0.targets", None, "lacks keys: 0.targets"),
])  # fmt: skip
def test_a_file_that_was_damaged_is_refused(organism, tmp_path, name, damage, sentence):
    Recipe.of(organism, [SetLatents.of(sae_of(), {5: 4.0, 17: 0.0})]).save(tmp_path / "r")
    path = tmp_path / "r" / "recipe.safetensors"
    tensors = load_file(path)
    if damage is None:
        del tensors[name]
    else:
        tensors[name] = damage(tensors[name]).contiguous()
    save_file(tensors, path)
    with pytest.raises(ValueError, match=sentence):
        Recipe.load(tmp_path / "r")


def test_words_of_a_file_that_are_wrong_are_refused(organism, tmp_path):
    Recipe.of(organism, [SetLatents.of(sae_of(), {5: 4.0})]).save(tmp_path / "r")
    path = tmp_path / "r" / "recipe.yaml"
    words = yaml.safe_load(path.read_text())
    for key, value, sentence in (("k", 1.5, "no whole number"), ("activation", "gelu", "Known: relu, jumprelu, topk")):
        changed = {**words, "steps": [{**words["steps"][0], key: value}]}
        path.write_text(yaml.safe_dump(changed))
        with pytest.raises(ValueError, match=sentence):
            Recipe.load(tmp_path / "r")


@pytest.mark.parametrize("activation", KINDS)
def test_applied_it_is_what_it_is_alone(organism, activation):
    """In one pass, scoped to the thinking; and batched, cached, as single."""
    ids = torch.tensor([encode_prompt(tokenizer_of(organism), "a 3 b +4 c *7") + [3, 56, 17]])
    edit = SetLatents.of(sae_of(activation), {5: 4.0, 17: 1.0})
    recipe = Recipe.of(organism, [edit], scope="thinking")
    with torch.no_grad(), captured(organism, [SITE]) as plain:
        organism(ids)
    with torch.no_grad(), applied(organism, recipe) as log, captured(organism, [SITE]) as steered:
        organism(ids)
    torch.testing.assert_close(steered[SITE][0, -3:], edit(plain[SITE][0, -3:]))
    assert torch.equal(steered[SITE][0, :-3], plain[SITE][0, :-3])
    assert log.tokens == 3
    prompts = ["a 3 b +4 c *7", "a 5 b *2", "a 1 b +1 c +1 d +1"]
    with applied(organism, recipe):
        batched = generate(organism, prompts, sampling=Sampling(temperature=0))
        single = [generate(organism, [p], sampling=Sampling(temperature=0))[0] for p in prompts]
    assert [c.ids for c in batched] == [c.ids for c in single]


def test_it_does_not_fold(organism):
    with pytest.raises(NotFoldable, match="set latents"):
        folded(organism, Recipe.of(organism, [SetLatents.of(sae_of(), {5: 4.0})]))


def test_what_cannot_be_set(organism):
    sae = sae_of()
    with pytest.raises(ValueError, match="Latent 160 is not one of the 160 latents"):
        SetLatents.of(sae, {160: 1.0})
    with pytest.raises(ValueError, match="reads one site and writes another"):
        SetLatents.of(replace(sae, output=Site(3, "mlp_out")), {1: 1.0})
    with pytest.raises(ValueError, match="is of width 12, but the activation has 96"):
        Recipe.of(organism, [SetLatents.of(sae_of(d_in=12), {1: 1.0})]).check(organism)


def test_its_file_says_what_it_does(organism, tmp_path):
    Recipe.of(organism, [SetLatents.of(sae_of(), {5: 4.0})]).save(Path(tmp_path) / "r")
    words = yaml.safe_load((tmp_path / "r" / "recipe.yaml").read_text())["steps"][0]
    assert words["kind"] == "set latents"
    assert words["site"] == "L2.resid_post"
