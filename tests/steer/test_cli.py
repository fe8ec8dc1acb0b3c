"""The commands do what the library does, end with one line of JSON, and tell errors in a sentence."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from probes.model.loading import ORGANISM, load
from probes.model.sites import Site
from steer.cli.main import main
from steer.cli.methods import demo
from steer.interventions.activation import Add
from steer.recipes.recipe import Recipe


@pytest.fixture
def steer(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder; gives exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["steer", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run


def last_json(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def test_demo_ends_with_one_json_object(steer, tmp_path, monkeypatch):
    whole = demo.demos()["organism"]
    few = replace(whole, n_probe=300, n_select=60, n_sweep=20, settings=whole.settings[12:20:2])
    monkeypatch.setattr(demo, "demos", lambda: {"organism": few})
    facts = last_json(steer("demo", "-n", "150", "-o", "out", "--json"))
    assert set(facts["direction"]) == {"auroc", "layer", "norm_over_stream_norm"}
    assert 0.5 < facts["direction"]["auroc"] <= 1
    for arm in ("plain", "published", "edited", "random_heads", "lowest_heads"):
        for group in (facts[arm], facts[arm]["marked"]):
            assert {"accuracy", "length", "truncation", "interval", "n"} <= group.keys()
        assert facts[arm]["n"] == 150
    assert facts["heads"]
    assert facts["max_logit_diff_fold_vs_hook"] < 1e-4
    assert (tmp_path / facts["checkpoint"] / "model.safetensors").is_file()
    assert "ThinkEdit" in steer("show", "out")[1]
    compared = last_json(
        steer("evaluate", "organism", "--checkpoint", "out", "--recipe", "out/recipe", "-n", "60", "--json")
    )
    assert compared["out"] == compared["out/recipe"]
    assert compared["out"]["accuracy"] >= compared["plain"]["accuracy"]


def test_evaluate_sets_every_kind_of_arm_beside_its_controls_and_keeps_the_completions(steer, tmp_path):
    model = load("organism")
    vector = torch.randn(96, generator=torch.Generator().manual_seed(0))
    for name, scale in (("r", 0.5), ("s", 0.0)):
        Recipe.of(model, [Add(Site(1, "resid_post"), scale * vector, 1.0)], scope="thinking").save(tmp_path / name)
    options = ("--recipe", "r", "--recipe", "s", "--draws", 2, "--prompt", "empty-thinking", "--store", "kept")
    words = ("evaluate", "organism", "-n", 30, *options, "--control", "budget:4/3", "--control", "wait:1", "--json")
    first = steer(*words)
    facts = last_json(first)
    nulls = ["r: random, same norm", "r: random, same KL", "s: random, same norm"]
    assert list(facts) == ["plain", "r", "s", "budget:4/3", "wait:1", "empty-thinking", *nulls]
    assert [facts[null]["samples"] for null in nulls] == [2, 2, 2]
    assert facts["s"] == facts["plain"] | {key: facts["s"][key] for key in ("p", "p_adjusted", "marked")}
    assert facts["budget:4/3"]["length"] <= 6
    assert facts["empty-thinking"]["length"] == 0  # its block is part of the prompt
    assert "s is reported without some of its random directions" in first[1].replace("\n", " ")
    held = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert len(held) == 6 + 6
    assert last_json(steer(*words)) == facts
    assert held == {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}


def test_generate_continues_and_direction_reads_what_it_wrote(steer, tmp_path):
    for n in (20, 40):
        arguments = ("--task", "chains", "-n", n, "-o", "c.jsonl", "--json")
        assert last_json(steer("generate", "organism", *arguments))["completions"] == n
    lines = (tmp_path / "c.jsonl").read_text().splitlines()
    assert len({json.loads(line)["id"] for line in lines}) == len(lines) == 40
    by_length = sorted(lines, key=lambda line: len(json.loads(line)["ids"]))
    (tmp_path / "short.jsonl").write_text("\n".join(by_length[:15]))
    (tmp_path / "long.jsonl").write_text("\n".join(by_length[-15:]))
    sides = ("--positive", "long.jsonl", "--negative", "short.jsonl", "--site", "L2.resid_post", "-o", "d.safetensors")
    facts = last_json(steer("direction", "organism", *sides, "--json"))
    assert facts["site"] == "L2.resid_post"
    assert facts["norm"] > 0
    kept = last_json(steer("direction", "organism", *sides[:-1], "kept.safetensors", "--keep-sinks", "--json"))
    assert kept["norm"] == facts["norm"]  # the thinking holds none
    assert "L2.resid_post" in steer("show", "d.safetensors")[1]
    assert all(json.loads(line)["id"] in steer("show", "c.jsonl")[1] for line in lines[:1])


def test_diff_of_equals_names_nothing(steer):
    assert last_json(steer("diff", "organism", ORGANISM, "--json")) == {"tensors": []}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("show", "nothing"), "nothing does not exist."),
        (("diff", "organism", "./nothing"), "'./nothing' is not a model: there is no such folder."),
        (("thinkedit", "organism", "-o", "there"), "there exists. Name another output folder, or remove it first."),
        (("thinkedit", "organism", "--short", "9", "-o", "x"), "Give both --short and --long, or neither"),
        (("evaluate", "organism", "--task", "gsm9k"), "'gsm9k' is neither a task nor a JSONL file."),
        (("evaluate", "organism", "--control", "budget"), "'budget' is not a decoding control: budget:THINKING"),
        (("evaluate", "organism", "--control", "wait:-1"), "A marker is inserted 0 times or more, but got n=-1."),
        (("evaluate", "organism", "--prompt", "shout"), "'shout' is not a prompt: step-by-step, ellipsis"),
        (("generate", "organism", "--split", "test", "-o", "x"), "'test' is not a split. Known: train, probe"),
        (("evaluate", "organism", "--recipe", "there"), "there holds no recipe.yaml: it is not a recipe."),
        (
            ("thinkedit", "organism", "--short", "2", "--long", "3", "--n-probe", "20", "-o", "x"),
            "but each class needs 10",
        ),
    ],
)
def test_an_error_is_a_sentence(steer, arguments, sentence, tmp_path):
    (tmp_path / "there").mkdir()
    code, _, err = steer(*arguments)
    assert code == 2
    assert sentence in err
    assert not (tmp_path / "x").exists()
    kept = ["x.completions"] if sentence == "but each class needs 10" else []  # it had generated, and would go on there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", *kept]
