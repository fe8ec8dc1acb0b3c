"""A file that is damaged, hostile, or says what no step of ours does, is refused in a sentence, and runs nothing."""

import json

import pytest
import torch
from exchanges import NAMES, control_vector, recipe_for, vector
from families import build

from probes.model.loading import load
from steer.interop.formats import FORMATS, export_recipe, import_recipe


@pytest.fixture
def model():
    return build("llama")


@pytest.mark.parametrize(
    ("directions", "options", "sentence"),
    [
        ({"direction.1": vector()}, {"arch": "llama"}, "has general.architecture 'llama', so it is no control vector"),
        ({"direction.1": vector()}, {"more": [("uint32", "llama.block_count", 3)]}, "unknown keys: llama.block_count"),
        ({"blk.1": vector()}, {}, "holds a tensor 'blk.1', and a control vector holds direction.<layer> alone"),
        ({"direction.-1": vector()}, {}, "holds a tensor 'direction.-1'"),
        ({"direction.1": vector().half()}, {}, "direction.1 in .* is F16 of shape .32,., and a direction is F32"),
        ({"direction.1": vector()[None]}, {}, "is F32 of shape .32, 1., and a direction is F32 of one dimension"),
        ({"direction.1": torch.ones(8)}, {}, "The vector for L1.resid_post has 8 entries, but the .* has 32"),
        ({"direction.1": vector() * torch.nan}, {}, "The vector for L1.resid_post holds NaN"),
        ({}, {}, "holds no directions"),
    ],
)  # fmt: skip
def test_a_gguf_that_is_no_control_vector_of_the_model_is_refused(directions, options, sentence, model, tmp_path):
    control_vector(tmp_path / "v.gguf", {name: x.numpy() for name, x in directions.items()}, **options)
    with pytest.raises(ValueError, match=sentence):
        import_recipe(tmp_path / "v.gguf", model)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_was_cut_is_refused_wherever_it_was(name, model, tmp_path):
    path = tmp_path / NAMES[name]
    export_recipe(recipe_for(model, name), path, name)
    whole = path.read_bytes()
    for cut in (0, 3, 11, 40, *range(50, len(whole) - 2, 1 + len(whole) // 60)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="make it again|Make it again"):
            import_recipe(path, model, name)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_for_another_model_is_refused(name, model, tmp_path):
    export_recipe(recipe_for(model, name), tmp_path / NAMES[name], name)
    other = build("llama", seed=1)
    if name == "easysteer":  # it has no room for the model's identity
        import_recipe(tmp_path / NAMES[name], other)
        other = load("organism")
        sentence = "has 32 entries, but the activation there has 96"
    else:
        sentence = "made for the model 'LlamaForCausalLM', not for .*: fingerprint"
    with pytest.raises(ValueError, match=sentence):
        import_recipe(tmp_path / NAMES[name], other)


def vectors(words):
    return words["vectors"][0]


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("easysteer", lambda w: w.update(note=1), "v.json has unknown keys: note. Known: vectors, conflict, debug"),
        ("easysteer", lambda w: w.update(conflict="priority"), "layer 0 with several vectors under .* 'priority'"),
        ("easysteer", lambda w: w.update(vectors=[]), "holds no list of vectors"),
        ("easysteer", lambda w: vectors(w).update(level=1), "Vector 0 in .* has unknown keys: level"),
        ("easysteer", lambda w: vectors(w).pop("apply"), "Vector 0 in .* lacks keys: apply"),
        ("easysteer", lambda w: vectors(w).update(source="v.gguf"), "needs either data or a source"),
        ("easysteer", lambda w: vectors(w).update(algorithm="replace"), "has algorithm 'replace', normalize False"),
        ("easysteer", lambda w: vectors(w).update(scale="1"), "has scale '1', which is no number"),
        ("easysteer", lambda w: vectors(w).update(params={"k": 1}), "has params"),
        ("easysteer", lambda w: vectors(w).update(layers=[2]), "steers the layers .2., and its vectors are for .0."),
        ("easysteer", lambda w: vectors(w).update(layers=2), "has layers 2, which are no list"),
        ("easysteer", lambda w: vectors(w)["apply"].pop("prompt"), "applies at {'generation': 'all'}, which no scope"),
        ("easysteer", lambda w: vectors(w)["apply"].update(answer="all"), "apply in .* has unknown keys: answer"),
        ("easysteer", lambda w: vectors(w)["data"].update(kind="linear"), "a payload of kind 'linear', version 1"),
        ("easysteer", lambda w: vectors(w)["data"].update(sha256="0"), "does not match its sha256: it is damaged"),
        ("easysteer", lambda w: vectors(w)["data"]["tensors"]["layer.0"].update(shape=[8]), "no float32 of shape .8."),
        ("easysteer", lambda w: vectors(w)["data"]["tensors"]["layer.0"].update(data="*"), "is not base64"),
        ("vllm-lens", lambda w: w.update(note=1), "Vector 0 in .* has unknown keys: note"),
        ("vllm-lens", lambda w: w.update(norm_match=True), "has norm_match True, and an Add adds one vector at every"),
        ("vllm-lens", lambda w: w.update(position_indices=[0]), "has position_indices .0., and an Add"),
        ("vllm-lens", lambda w: w.update(layer_indices=[0, 1]), "has 3 rows for the layers .0, 1.: each needs its own"),
        ("vllm-lens", lambda w: w.update(layer_indices=[0, 1, 1]), "each needs its own"),
        ("vllm-lens", lambda w: w.update(layer_indices=[0, 1, -1]), "which are no layers"),
        ("vllm-lens", lambda w: w["activations"].update(shape=[3, 1, 32]), "an Add has no positions"),
        ("vllm-lens", lambda w: w["activations"].update(shape=[3, 31]), "is no torch.float32 of shape .3, 31.: it"),
        ("vllm-lens", lambda w: w["activations"].update(shape=[6, 16]), "has 6 rows for the layers"),
        ("vllm-lens", lambda w: w["activations"].update(data="AAAA"), "is no torch.float32 of shape"),
        ("vllm-lens", lambda w: w["activations"].update(dtype="int8"), "is int8 as torch.float32, packed by zstd"),
        ("vllm-lens", lambda w: w.update(scale=float("nan")), "holds NaN, which is no finite number"),
        ("vllm-lens", lambda w: w["activations"].update(compression=None), "packed by None"),
        ("vllm-lens", lambda w: w["activations"].update(dtype=["int8"]), "is .'int8'. as torch.float32"),
        ("vllm-lens", lambda w: w.update(thinksteer="3"), "What ThinkSteer noted in .* is int, where a mapping"),
        ("vllm-lens", lambda w: w.update(scale=True), "has scale True, which is no number"),
        ("vllm-lens", lambda w: w.update(thinksteer='{"method": "", "model": {}}'), "The model noted in .* lacks keys"),
        ("vllm-lens", lambda w: w.update(thinksteer="{}"), "What ThinkSteer noted in .* lacks keys: method, model"),
        ("lm-eval", lambda w: w["layers.1"].update(note=1), "layers.1 in .* has unknown keys: note"),
        ("lm-eval", lambda w: w["layers.1"].update(action="mul"), "has action 'mul'. Known: add without a bias, and"),
        ("lm-eval", lambda w: w["layers.1"].update(bias=vector()), "Known: add without a bias, and clamp"),
        ("lm-eval", lambda w: w["layers.1"].update(head_index=1), "its module has no heads to index"),
        ("lm-eval", lambda w: w["layers.1"].update(steering_vector=torch.ones(2, 32)), "is no vector of numbers"),
        ("lm-eval", lambda w: w["layers.1"].update(steering_vector=torch.ones(8)), "has 8 entries, but .* has 32"),
        ("lm-eval", lambda w: w["layers.1"].update(steering_vector=vector() * torch.inf), "holds NaN or infinite"),
        ("lm-eval", lambda w: w["layers.1"].update(steering_coefficient=None), "has steering_coefficient None"),
        ("lm-eval", lambda w: w.update({"model.layers.1": w["layers.1"]}), "names modules of model.base_model"),
        ("lm-eval", lambda w: w.update({"layers.01": w["layers.1"]}), "steers 'layers.01', which is no module"),
        ("lm-eval", lambda w: w.update({"layers.1.mlp.up_proj": w["layers.1"]}), "The output of .* is not a site"),
        ("lm-eval", lambda w: w.clear(), "holds no modules by name"),
    ],
)  # fmt: skip
def test_what_a_file_says_beyond_us_is_refused_by_name(name, change, sentence, model, tmp_path):
    path = tmp_path / NAMES[name]
    export_recipe(recipe_for(model, name), path, name)
    words = torch.load(path, weights_only=True) if name == "lm-eval" else json.loads(path.read_text())
    change(words)
    if name == "lm-eval":
        torch.save(words, path)
    else:
        path.write_text(json.dumps(words))
    with pytest.raises(ValueError, match=sentence):
        import_recipe(path, model, name)


def test_a_torch_file_runs_no_code(model, tmp_path):
    class Opens:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")

    torch.save({"layers.1": Opens()}, tmp_path / "v.pt")
    with pytest.raises(ValueError, match="is not a whole torch file of plain tensors"):
        import_recipe(tmp_path / "v.pt", model)
    assert not (tmp_path / "made").exists()


def test_a_file_that_does_not_tell_its_format_is_refused(model, tmp_path):
    for name, text in (("v.bin", "x"), ("v.json", "{}"), ("w.json", "[]"), ("x.json", "3")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="its name and keys do not tell. Name the format: gguf, "):
            import_recipe(tmp_path / name, model)
    with pytest.raises(FileNotFoundError, match="nothing.gguf is not a file"):
        import_recipe(tmp_path / "nothing.gguf", model)
