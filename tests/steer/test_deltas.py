"""Weight deltas: what peft merges, what truncation keeps, what a pattern takes, and how controls differ."""

import json

import pytest
import torch
import yaml
from families import build, build_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from probes.model.loading import tokenizer_of
from steer.checkpoints.checkpoint import Checkpoint
from steer.cli.weights.vector import app
from steer.deltas._norms import cosine, norms
from steer.deltas.delta import WeightDelta, matches
from steer.deltas.nulls import random_like, shuffled_layers
from steer.deltas.opened import Stored, open_delta
from steer.deltas.stored import save
from steer.methods.reasoning_vectors import nulls


def write(folder, family="llama", seed=0):
    model = build(family, seed=seed)
    model.save_pretrained(folder)
    tokenizer_of(model).save_pretrained(folder)
    return folder


@pytest.fixture
def pair(tmp_path):
    return write(tmp_path / "after", seed=1), write(tmp_path / "before", seed=2)


ADAPTERS = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 12}),
    "rslora": ("llama", {"target_modules": ["o_proj"], "r": 4, "lora_alpha": 12, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 12,
            "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5},
        },
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 3, "lora_alpha": 5, "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "up_proj"], "r": 4, "lora_alpha": 2}),
    "bias": ("llama+bias", {"target_modules": ["o_proj"], "r": 4, "lora_alpha": 2, "lora_bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_adds_what_peft_merges(name, tmp_path):
    family, settings = ADAPTERS[name]
    plain = build(family).state_dict()
    peft = get_peft_model(build(family), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in peft.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(tmp_path / "adapter")
    delta = open_delta(tmp_path / "adapter")
    merged = peft.merge_and_unload().state_dict()
    changed = {key for key, value in merged.items() if not torch.equal(value, plain[key])}
    assert changed == set(delta.names)
    for key in changed:
        ours = plain[key].double() + delta.tensor(key).double()
        torch.testing.assert_close(ours.float(), merged[key], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close((0.5 * delta).tensor(key), 0.5 * delta.tensor(key))  # the product, not its factors


REFUSED = {"use_dora": True, "init_lora_weights": "pissa", "modules_to_save": ["lm_head"], "bias": "all"}


@pytest.mark.parametrize("key", REFUSED)
def test_adapters_that_are_no_product_are_refused_by_name(key, tmp_path):
    get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: REFUSED[key]}))
    with pytest.raises(ValueError, match=f"uses {'init .pissa' if 'init' in key else key}.*merge_and_unload"):
        open_delta(tmp_path)


def test_it_is_the_difference_and_deltas_add_and_scale(pair):
    a, b = (load_file(folder / "model.safetensors") for folder in pair)
    delta = WeightDelta.between(*pair)
    assert set(delta.names) == set(a)
    mixed = 2 * delta - 0.5 * delta
    for name in delta.names:
        wanted = a[name].double() - b[name].double()
        assert torch.equal(delta.tensor(name), wanted.float())
        assert torch.equal(mixed.tensor(name), (1.5 * wanted).float())


def test_stored_it_is_float32_and_linked_it_follows_the_checkpoints(pair, tmp_path):
    delta = WeightDelta.between(*pair)
    stored, linked = save(delta, tmp_path / "stored"), save(delta, tmp_path / "linked", linked=True)
    for name in delta.names:
        assert torch.equal(stored.tensor(name), delta.tensor(name))
        assert torch.equal(linked.tensor(name), delta.tensor(name))
    assert stored.vocabulary == linked.vocabulary == Checkpoint.open(pair[0]).vocabulary
    write(pair[0], seed=7)
    with pytest.raises(ValueError, match="is not what it was when the delta was made"):
        open_delta(tmp_path / "linked")
    words = yaml.safe_load((tmp_path / "stored" / "delta.yaml").read_text())
    (tmp_path / "stored" / "delta.yaml").write_text(yaml.safe_dump(words | {"more": 1}))
    with pytest.raises(ValueError, match="unknown keys: more"):
        open_delta(tmp_path / "stored")


def test_half_precision_is_one_rounding_and_a_number_out_of_its_range_is_refused(pair, tmp_path):
    delta = WeightDelta.between(*pair)
    for rank in (None, 2):
        exact = save(delta, tmp_path / f"float32-{rank}", rank=rank)
        half = save(delta, tmp_path / f"bfloat16-{rank}", rank=rank, dtype=torch.bfloat16)
        for name in delta.names:
            whole = rank is None or len(delta.shape(name)) == 1
            wanted = exact.tensor(name).bfloat16().float() if whole else exact.tensor(name)
            loose = 0 if whole else 0.01 * float(wanted.abs().max())
            torch.testing.assert_close(half.tensor(name), wanted, rtol=0, atol=loose)
        sizes = [
            sum(path.stat().st_size for path in (tmp_path / f"{dtype}-{rank}").glob("*.safetensors"))
            for dtype in ("float32", "bfloat16")
        ]
        assert sizes[1] < 0.75 * sizes[0]  # the headers stay
    with pytest.raises(ValueError, match="holds numbers that are not finite: nothing was written"):
        save(1e6 * delta, tmp_path / "far", dtype=torch.float16)
    with pytest.raises(ValueError, match="not in int8"):
        save(delta, tmp_path / "far", dtype=torch.int8)
    assert not (tmp_path / "far").exists()


def test_a_low_rank_delta_keeps_the_energy_it_reports(pair, tmp_path):
    """A matrix of rank 2 comes back; of the others the largest directions are kept, as an exact SVD has them."""
    a, b = (load_file(folder / "model.safetensors") for folder in pair)
    planted = "model.layers.1.mlp.down_proj.weight"
    generator = torch.Generator().manual_seed(0)
    a[planted] = b[planted] + torch.randn(32, 2, generator=generator) @ torch.randn(2, 48, generator=generator)
    save_file(a, pair[0] / "model.safetensors", metadata={"format": "pt"})
    found = save(WeightDelta.between(*pair), tmp_path / "low", rank=2)
    stored = found.terms[0].source
    assert isinstance(stored, Stored)
    torch.testing.assert_close(found.tensor(planted), a[planted] - b[planted], rtol=1e-5, atol=1e-5)
    kept = whole = 0.0
    for name in (n for n in a if a[n].dim() == 2):
        delta = a[name].double() - b[name].double()
        values = torch.linalg.svdvals(delta).square()
        kept, whole = kept + float(values[:2].sum()), whole + float(values.sum())
        left = float((delta - found.tensor(name).double()).norm() ** 2)
        assert left == pytest.approx(float(values[2:].sum()), rel=0.02, abs=1e-6)
    assert stored.kept_energy() == pytest.approx(kept / whole, rel=0.02)
    assert stored.kept_energy() < 0.9
    one = "model.norm.weight"
    assert torch.equal(found.tensor(one), (a[one].double() - b[one].double()).float())


@pytest.mark.parametrize(
    ("name", "pattern", "taken"),
    [
        ("model.layers.10.mlp.down_proj.weight", "layers.*.mlp", True),
        ("model.layers.10.mlp.down_proj.weight", "layers.1.mlp", False),
        ("model.layers.10.mlp.down_proj.weight", "layers.1?", True),
        ("model.layers.10.self_attn.o_proj.weight", "layers.*.mlp", False),
        ("model.embed_tokens.weight", "embed", True),
        ("lm_head.weight", "embed", True),
        ("model.layers.0.mlp.experts.3.down_proj.weight", "experts.3", True),
        ("model.norm.weight", "*", True),
    ],
)
def test_a_pattern_is_any_run_of_the_names_parts(name, pattern, taken):
    assert matches(name, pattern) is taken


def test_selections_leave_the_rest_and_refuse_what_matches_nothing(pair):
    delta = WeightDelta.between(*pair)
    mlp, rest = delta.selected(["layers.*.mlp"]), delta.selected(skip=["layers.*.mlp", "embed"])
    assert len(mlp.names) == 9
    assert not set(mlp.names) & set(rest.names)
    assert len(delta.names) - len(mlp.names) - len(rest.names) == 1 + (not Checkpoint.open(pair[0]).tied)
    with pytest.raises(ValueError, match=r"'layers.9' matches no tensor"):
        delta.selected(["layers.9"])
    with pytest.raises(ValueError, match="leaves no tensor"):
        mlp.selected(["layers"], ["mlp"])


def test_donors_of_another_kind_are_refused_and_other_vocabularies_lose_their_embeddings(pair, tmp_path):
    with pytest.raises(ValueError, match="do not hold the same tensors"):
        WeightDelta.between(pair[0], write(tmp_path / "bias", "llama+bias"))
    build_tokenizer(("<pad>", "<bos>", "<eos>", "<think>", "</think>", "!")).save_pretrained(pair[1])
    delta = WeightDelta.between(*pair)
    assert not [name for name in delta.names if matches(name, "embed")]
    assert "the tokenizers of" in delta.notes[0]
    (pair[1] / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in WeightDelta.between(*pair).notes[0]


def test_norms_and_cosines_are_those_of_the_flattened_tensors(pair):
    delta = WeightDelta.between(*pair)
    other = random_like(delta, seed=3)
    x, y = (torch.cat([d.tensor(n).double().flatten() for n in delta.names]) for d in (delta, other))
    table = norms(delta, {"noise": other})
    assert table.rows[-1][2:] == pytest.approx((len(delta.names), float(x.norm()), float(x @ y / x.norm() / y.norm())))
    assert sum(row[3] ** 2 for row in table.rows[:-1]) == pytest.approx(float(x.norm()) ** 2)
    assert cosine(delta, -2 * delta) == pytest.approx(-1)


def test_controls_have_the_size_of_the_delta_in_every_tensor_or_its_tensors_elsewhere(pair):
    delta = WeightDelta.between(*pair)
    three = nulls(delta, seed=1)
    assert set(three) == {"subtracted", "noise", "shuffled layers"}
    noise, shuffled = three["noise"], three["shuffled layers"]
    for name in delta.names:
        assert float(noise.tensor(name).norm()) == pytest.approx(float(delta.tensor(name).norm()), rel=1e-5)
    assert abs(cosine(delta, noise)) < 0.05
    assert cosine(noise, random_like(delta, seed=2)) < 0.05
    assert cosine(noise, random_like(delta, seed=1)) == pytest.approx(1)
    layers = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    came = [
        next(j for j in range(3) if torch.equal(shuffled.tensor(layers[i]), delta.tensor(layers[j]))) for i in range(3)
    ]
    assert sorted(came) == [0, 1, 2]
    assert all(i != j for i, j in enumerate(came))
    assert torch.equal(shuffled.tensor("model.norm.weight"), delta.tensor("model.norm.weight"))
    with pytest.raises(ValueError, match="nothing to shuffle"):
        shuffled_layers(delta.selected(["layers.0"]))


def test_the_command_makes_shows_and_adds(pair, tmp_path):
    def steer(*words):
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    steer("make", pair[0], pair[1], "-o", tmp_path / "delta", "--linked", "--skip", "embed")
    assert "down_proj" in steer("show", tmp_path / "delta")
    facts = ("add", pair[1], tmp_path / "delta", "-o", tmp_path / "out", "--only", "layers.*.mlp", "--json")
    plan = json.loads(steer(*facts, "--dry-run").splitlines()[-1])
    assert plan["touched"] == 9
    assert not (tmp_path / "out").exists()
    steer(*facts)
    after, out = (load_file(folder / "model.safetensors") for folder in (pair[0], tmp_path / "out"))
    assert all(torch.equal(after[name], out[name]) for name in plan["tensors"])
    recipe = tmp_path / "merge.yaml"
    steer("make", pair[0], pair[1], "-o", tmp_path / "whole", "--linked")
    steer("to-mergekit", pair[1], tmp_path / "whole", "-o", recipe, "--method", "ties", "--density", 0.5)
    words = yaml.safe_load(recipe.read_text())
    assert words["base_model"] == str(pair[1])
    assert words["models"] == [{"model": str(pair[0]), "parameters": {"weight": 1.0, "density": 0.5}}]
