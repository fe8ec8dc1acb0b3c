"""A recipe is the same in memory, on disk and at work; it refuses what it does not know, and leaves nothing behind."""

from dataclasses import asdict, replace

import pytest
import torch
import yaml
from families import build

from probes.model.hooks import attached, captured
from probes.model.loading import identity_of
from probes.model.sites import Site
from probes.tensors import read_tensors, write_tensors
from steer.interventions.activation import Ablate, Add, Clamp
from steer.recipes.recipe import Recipe, Step
from steer.recipes.scope import Scope
from steer.runtime._applied import applied

SITES = [
    Site.parse(t)
    for t in ("L0.resid_pre", "L1.attn_in", "L1.attn_out", "L1.mlp_out", "L1.z", "L1H2.z", "L2.resid_post")
]
WRITE = Site(1, "result", 2)
KINDS = {
    "add": lambda site, v: Add(site, v, 0.7),
    "ablate": lambda site, v: Ablate(site, v, 0.7, target=0.4),
    "clamp": lambda site, v: Clamp(site, v, 0.7, low=-0.1, high=0.2),
}
# beside the tiny models' delimiters <think> = 3, </think> = 4 and header ? = 5
THOUGHT = torch.tensor([[1, 7, 5, 3, 8, 9, 4, 10], [1, 12, 13, 5, 3, 14, 15, 16]])


def random_vector(width=32, seed=2):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def run(model, tokens, sites, recipe=None):
    """Logits, and the activations at the sites after the recipe's edits."""
    with applied(model, recipe or Recipe.of(model, [])), captured(model, sites) as cache:
        return model(tokens).logits, cache


def two_steps(model):
    return Recipe.of(model, [Add(SITES[0], random_vector()), Clamp(SITES[-1], random_vector(), high=1.0)], method="m")


@pytest.fixture
def saved(tmp_path):
    two_steps(build("llama")).save(tmp_path / "recipe")
    return tmp_path / "recipe"


@torch.no_grad()
def test_what_is_saved_is_what_is_loaded_to_the_bit(tmp_path):
    model, sites = build("llama"), (Site(0, "attn_out"), Site(1, "mlp_out"), WRITE)
    steps = [
        Step(Add(sites[0], random_vector(), -0.3), Scope("thinking")),
        Step(Ablate(sites[1], random_vector(seed=3).bfloat16(), 0.9, target=-1.25), Scope("answer")),
        Step(Clamp(sites[2], random_vector(seed=4), 1 / 3, low=0.1), Scope("prompt")),
        Step(Clamp(sites[0], random_vector(seed=5), high=-0.1)),
        Step(Clamp(sites[0], random_vector(seed=6))),
    ]
    recipe = Recipe(tuple(steps), identity_of(model), "by hand: <b> ünïcode")
    recipe.save(tmp_path / "recipe")
    again = Recipe.load(tmp_path / "recipe")
    assert (again.model, again.method) == (recipe.model, recipe.method)
    for ours, theirs in zip(recipe.steps, again.steps, strict=True):
        assert type(ours.intervention) is type(theirs.intervention)
        a, b = asdict(ours), asdict(theirs)
        vectors = [step["intervention"].pop("vector") for step in (a, b)]
        assert a == b
        assert vectors[0].dtype is vectors[1].dtype
        assert torch.equal(*vectors)
    plain, steered, reread = (run(model, THOUGHT, [], r)[0] for r in (None, recipe, again))
    assert torch.equal(reread, steered)
    assert not torch.allclose(steered, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda w: w.update(note=1),
            "recipe.yaml has unknown keys: note. Known: format, method, model, births, steps.",
        ),
        (lambda w: w.pop("method"), "recipe.yaml lacks keys: method."),
        (lambda w: w["model"].update(sha="0"), "model in .*recipe.yaml has unknown keys: sha."),
        (lambda w: w["model"].pop("fingerprint"), "model in .*recipe.yaml lacks keys: fingerprint."),
        (lambda w: w["steps"][0].update(strenght=1.0), "Step 0 in .* has unknown keys: strenght. Known: kind, scope"),
        (lambda w: w["steps"][0].update(target=1.0), "Step 0 in .* has unknown keys: target."),
        (lambda w: w["steps"][1].pop("strength"), "Step 1 in .* lacks keys: strength."),
        (lambda w: w["steps"][1].pop("kind"), "Step 1 in .* has kind None. Known: add, ablate, scale, clamp, rotate."),
        (
            lambda w: w["steps"][1].update(kind="mul"),
            "Step 1 in .* has kind 'mul'. Known: add, ablate, scale, clamp, rotate.",
        ),
        (lambda w: w["steps"][0].update(scope="late"), "Step 0 in .* has scope 'late'. Known: all, prompt"),
        (lambda w: w["steps"][0].update(site="L0.stream"), "'L0.stream' is not a site. Write L<layer>.<name>"),
        (lambda w: w.update(format="recipe 2"), "has format 'recipe 2', and this version reads 'thinksteer recipe 2'"),
        (lambda w: w["steps"].append(dict(w["steps"][0])), "recipe.safetensors lacks keys: 2.vector."),
        (lambda w: w["steps"].pop(), "recipe.safetensors has unknown keys: 1.vector."),
    ],
)
def test_what_is_unknown_or_missing_is_refused_by_name(saved, change, sentence):
    path = saved / "recipe.yaml"
    words = yaml.safe_load(path.read_text())
    change(words)
    path.write_text(yaml.safe_dump(words))
    with pytest.raises(ValueError, match=sentence):
        Recipe.load(saved)


@pytest.mark.parametrize(("key", "value"), [("strength", None), ("strength", "big"), ("site", None), ("kind", ["add"])])
def test_a_value_that_is_none_of_its_key_is_refused_by_step_and_key(saved, key, value):
    """Null stands for an infinite bound, and for nothing else: a strength that is not given is not 1."""
    words = yaml.safe_load((saved / "recipe.yaml").read_text())
    words["steps"][1][key] = value
    (saved / "recipe.yaml").write_text(yaml.safe_dump(words))
    with pytest.raises(ValueError, match=f"Step 1 in .*{key}"):
        Recipe.load(saved)


def test_tensors_that_are_missing_truncated_or_too_many_are_refused(saved):
    path = saved / "recipe.safetensors"
    whole, (tensors, _) = path.read_bytes(), read_tensors(path)
    for cut in (0, 5, 30, len(whole) - 1):  # the length of the header, the header, the tensors
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="recipe.safetensors is not a whole safetensors file .* truncated"):
            Recipe.load(saved)
    write_tensors(path, {"0.vector": tensors["0.vector"]})
    with pytest.raises(ValueError, match="recipe.safetensors lacks keys: 1.vector."):
        Recipe.load(saved)
    write_tensors(path, tensors | {"more": torch.ones(1)})
    with pytest.raises(ValueError, match="recipe.safetensors has unknown keys: more."):
        Recipe.load(saved)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="recipe.safetensors"):
        Recipe.load(saved)


def test_a_recipe_runs_no_code(saved, tmp_path):
    path = saved / "recipe.yaml"
    path.write_text(f"!!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    with pytest.raises(ValueError, match="recipe.yaml has a tag .*os.mkdir.: write plain texts"):
        Recipe.load(saved)
    assert not (tmp_path / "made").exists()
    path.write_text("")
    with pytest.raises(ValueError, match="recipe.yaml holds no keys: it is not a recipe"):
        Recipe.load(saved)
    with pytest.raises(FileNotFoundError, match="holds no recipe.yaml: it is not a recipe"):
        Recipe.load(tmp_path)


def test_an_existing_folder_is_refused_and_kept(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(FileExistsError, match="recipe exists. Name another output folder, or remove it first."):
        Recipe.of(build("gpt2"), []).save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["recipe"]


def test_a_recipe_of_another_model_is_refused(saved):
    recipe, here = Recipe.load(saved), identity_of(build("llama"))["fingerprint"]
    other = identity_of(build("llama", seed=1))["fingerprint"]
    sentence = f"for the model 'LlamaForCausalLM', not for .*: fingerprint {here} there, {other} here. Derive it again"
    with pytest.raises(ValueError, match=sentence):
        run(build("llama", seed=1), THOUGHT, [], recipe)
    with pytest.raises(ValueError, match="model_type llama there, gpt2 here"):
        run(build("gpt2"), THOUGHT, [], recipe)
    recipe.check(build("llama", dtype=torch.bfloat16))  # the same weights, rounded


@torch.no_grad()
@pytest.mark.parametrize("site", SITES, ids=str)
def test_edits_of_one_site_compose_in_their_order(site, tokens):
    model = build("llama")
    width = run(model, tokens, [site])[1][site].shape[-1]
    first, second = (Ablate(site, random_vector(width, seed), target=seed) for seed in (3, 4))
    elsewhere = Ablate(Site(0, "mlp_out"), random_vector())
    both = run(model, tokens, [], Recipe.of(model, [first, elsewhere, second]))[0]
    with applied(model, Recipe.of(model, [elsewhere])), attached(model, site, lambda x: second(first(x))):
        torch.testing.assert_close(both, model(tokens).logits, atol=1e-5, rtol=0)
    swapped = run(model, tokens, [], Recipe.of(model, [second, elsewhere, first]))[0]
    assert (both - swapped).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_edit_of_the_stream_stays_in_the_stream(family, name, tokens):
    """Where nothing is edited, a stream is still the one before plus what is added."""
    model, names = build(family), ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    recipe = Recipe.of(model, [Add(Site(1, name), random_vector())])
    cache = run(model, tokens, [Site(1, n) for n in names] + [Site(2, "resid_pre")], recipe)[1]
    pre, attn, mid, mlp, post = (cache[Site(1, n)] for n in names)
    if name != "resid_mid":
        torch.testing.assert_close(pre + attn, mid, atol=1e-5, rtol=1e-4)
    if name != "resid_post":
        torch.testing.assert_close(mid + mlp, post, atol=1e-5, rtol=1e-4)
    assert torch.equal(post, cache[Site(2, "resid_pre")])


@torch.no_grad()
@pytest.mark.parametrize("scope", ["all", "thinking"])
def test_after_the_block_and_after_an_error_in_it_the_model_is_plain(scope):
    model = build("llama")
    plain = model(THOUGHT).logits
    recipe = Recipe.of(model, [KINDS["clamp"](site, random_vector()) for site in (SITES[0], WRITE)], scope=scope)
    with applied(model, recipe):
        assert not torch.equal(model(THOUGHT).logits, plain)
    assert torch.equal(model(THOUGHT).logits, plain)
    with pytest.raises(KeyboardInterrupt), applied(model, recipe):
        raise KeyboardInterrupt
    too_wide = Recipe.of(model, [*(s.intervention for s in recipe.steps), Add(SITES[-1], torch.ones(33))], scope=scope)
    with pytest.raises((ValueError, RuntimeError)), applied(model, too_wide):
        model(THOUGHT)
    too_high = Recipe.of(model, [Add(SITES[0], torch.ones(32)), Add(Site(9, "z"), torch.ones(32))], scope=scope)
    with (
        pytest.raises(IndexError, match="Layer 9 is out of range: the model has layers 0 to 2"),
        applied(model, too_high),
    ):
        pass
    assert torch.equal(model(THOUGHT).logits, plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_strength_0_is_the_identity(model, tokens):
    plain, cache = run(model, tokens, [*SITES, WRITE])
    widths = {site: x.shape[-1] for site, x in cache.items()}
    edits = [make(site, random_vector(width)) for site, width in widths.items() for make in KINDS.values()]
    nothing = Recipe.of(model, [replace(edit, strength=0.0) for edit in edits])
    torch.testing.assert_close(run(model, tokens, [], nothing)[0], plain, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2", "mixtral"])
@pytest.mark.parametrize("scope", ["all", "thinking"])
def test_a_bfloat16_model_stays_bfloat16(family, scope):
    model = build(family, dtype=torch.bfloat16)
    widths = {site: x.shape[-1] for site, x in run(model, THOUGHT, [*SITES, WRITE])[1].items()}
    for make in KINDS.values():
        recipe = Recipe.of(model, [make(site, random_vector(width)) for site, width in widths.items()], scope=scope)
        logits, cache = run(model, THOUGHT, SITES, recipe)
        assert {x.dtype for x in (logits, *cache.values())} == {torch.bfloat16}


@torch.no_grad()
def test_ablate_sets_the_projection_at_its_site_and_changes_nothing_else(model, tokens):
    for site, x in run(model, tokens, SITES[2:])[1].items():
        unit = torch.nn.functional.normalize(random_vector(x.shape[-1]), dim=0)
        for target in (0.0, -1.5):
            edit = Ablate(site, 3 * unit, target=target)
            y = run(model, tokens, [site], Recipe.of(model, [edit]))[1][site]
            torch.testing.assert_close(y @ unit, torch.full(y.shape[:-1], target), atol=1e-5, rtol=0)
            torch.testing.assert_close(y - target * unit, x - (x @ unit)[..., None] * unit, atol=1e-5, rtol=0)
            torch.testing.assert_close(edit(y), y, atol=1e-5, rtol=0)


@torch.no_grad()
def test_clamp_keeps_the_projection_within_its_bounds_and_leaves_what_is_inside(model, tokens):
    for site, x in run(model, tokens, SITES[2:])[1].items():
        unit = torch.nn.functional.normalize(random_vector(x.shape[-1]), dim=0)
        low, high = (x @ unit).quantile(torch.tensor([0.3, 0.6])).tolist()
        y = run(model, tokens, [site], Recipe.of(model, [Clamp(site, 3 * unit, low=low, high=high)]))[1][site]
        inside = ((x @ unit) > low) & ((x @ unit) < high)
        assert 0 < inside.sum() < inside.numel()
        assert torch.equal(y[inside], x[inside])
        torch.testing.assert_close(y @ unit, (x @ unit).clamp(low, high), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "granite", "gpt2", "qwen3_moe"])
def test_no_activation_is_written_in_place(family, tokens):
    """What was read before an edit is, after the whole pass, what an unedited pass gives."""
    model = build(family)
    for site in SITES:
        plain = run(model, tokens, [site])[1][site]
        recipe = Recipe.of(model, [make(site, random_vector(plain.shape[-1])) for make in KINDS.values()])
        with captured(model, [site]) as before, applied(model, recipe):
            model(tokens)
        assert torch.equal(before[site], plain)


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        lambda: Add(SITES[0], torch.ones(1)),
        lambda: Ablate(SITES[0], torch.ones(33)),
        lambda: Ablate(SITES[0], torch.zeros(32)),
        lambda: Clamp(SITES[0], torch.zeros(32), low=0.0),
    ],
)
def test_a_vector_of_another_width_is_never_stretched_nor_a_zero_one_projected_on(make):
    model = build("llama")
    with pytest.raises(ValueError, match="L0.resid_pre"):
        run(model, THOUGHT, [], Recipe.of(model, [make()]))


def test_in_a_notebook_a_recipe_shows_its_steps_and_escapes_its_words():
    page = Recipe.of(build("llama"), [Add(WRITE, random_vector())], method="after <think>")._repr_html_()
    assert {word for word in ("L1H2.result", "add", "all", "after &lt;think&gt;") if word not in page} == set()
    assert "<think>" not in page
