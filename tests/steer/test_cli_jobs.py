"""Every command ends in JSON on request; recipes are made of directions; a job's size is told before it is done."""

import json
import shlex
import sys

import pytest
import typer

from probes import Direction
from probes.directions import direction_between
from probes.generation import _generate, progress
from probes.generation._batch import Transformers
from probes.model import Site, load
from steer import Ablate, Add, Recipe, Scope
from steer.cli.main import app, main
from steer.cli.methods import organism as training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    model = load("organism")
    for name, tail in (("slow", "? <think>"), ("quick", "quick ? <think>")):
        rows = [json.dumps({"text": f"a {i} b +4 {tail}"}) + "\n" for i in range(5)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    for name, site in (("d", "L2.resid_post"), ("e", "L1.resid_post")):
        made = direction_between(model, ["a 3 quick", "a 4 quick"], ["a 3", "a 4"], site, position="text_last")
        made.save(folder / f"{name}.safetensors")
    Recipe.of(model, [Add.of(made, 0.5)]).save(folder / "recipe")
    return folder


@pytest.fixture
def facts(monkeypatch, capsys, folder):
    """What a command says in its last line, under --json."""
    monkeypatch.chdir(folder)

    def run(words):
        monkeypatch.setattr(sys, "argv", ["steer", *shlex.split(words), "--json"])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert (end.value.code or 0) == 0, err
        assert err == ""  # no bar where there is no terminal
        found = json.loads(out.splitlines()[-1], parse_constant=pytest.fail)
        assert isinstance(found, dict)
        return found

    return run


def commands(command, path=()):
    inner = getattr(command, "commands", None)
    if inner is None:
        yield " ".join(path), command
    for name, part in (inner or {}).items():
        yield from commands(part, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json(name):
    assert any("--json" in parameter.opts for parameter in COMMANDS[name].params)


@pytest.mark.parametrize(
    "words",
    [
        "generate organism -n 2 -o some.jsonl",
        "show d.safetensors",
        "show recipe",
        "compare organism --recipe recipe --prompt 'a 3 b +4'",
        "direction organism --positive quick.jsonl --negative slow.jsonl --last --site L2.resid_post -o n.safetensors",
        "recipe organism --ablate d.safetensors -o ablated",
        "diff organism organism",
        "serve organism --recipe quicker=recipe --dry-run",
        "parity organism recipe -n 2 --max-new-tokens 12 --no-vllm",
        "export recipe --to gguf -o recipe.gguf",
        "import recipe.gguf organism -o back",
        "vector make organism organism -o delta --rank 1",
        "vector show organism-rl",
        "vector add organism organism-rl -o sum",
        "vector make organism organism --linked -o linked",
        "vector to-mergekit organism linked",
        "vector to-mergekit organism linked -o merge.yaml",
    ],
)
def test_a_command_ends_in_one_object(facts, words):
    assert facts(words)


def test_samples_are_chosen_from_a_store(facts, folder):
    facts("generate organism -n 30 --samples 3 --temperature 1 -o samples.jsonl")
    found = facts("select samples.jsonl --by margin --by brevity --model organism -o chosen.jsonl")
    assert found["first sample"]["drawn"] == 1
    assert found["best by margin"]["tokens"] == found["majority"]["tokens"]
    assert found["best by margin"]["accuracy"] > found["best by brevity"]["accuracy"]
    assert len((folder / "chosen.jsonl").read_text().splitlines()) == 30


def test_training_ends_in_one_object(facts, monkeypatch):
    monkeypatch.setattr(training.steer.training, "train", lambda output, **_: output.mkdir())
    monkeypatch.setattr(training.steer.training, "train_donor", lambda _, output, **__: output.mkdir(parents=True))
    assert facts("organism --steps 3 -o trained") == {"steps": 3, "seed": 0, "output": "trained"}
    assert set(facts("donors -o donors")) == set(training.steer.training.DONORS)


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ("--add d.safetensors", lambda d, _: ([Add.of(d, 1.0)], "all")),
        (
            "--add d.safetensors --strength -0.5 --units raw --scope thinking",
            lambda d, _: ([Add.of(d, -0.5, units="raw")], "thinking"),
        ),
        (
            "--add d.safetensors --add e.safetensors --ablate e.safetensors --strength 1 --strength 2 --strength 0.5",
            lambda d, e: ([Add.of(d, 1.0), Add.of(e, 2.0), Ablate.of(e, 0.5)], "all"),
        ),
        (
            "--ablate d.safetensors --layers 0,2-3 --scope thinking --window 2-9",
            lambda d, _: (
                [Ablate(Site(n, "resid_post"), d.vector, birth=d.provenance) for n in (0, 2, 3)],
                Scope("thinking", window=(2, 9)),
            ),
        ),
        (
            "--add d.safetensors --scope thinking --window 4-",
            lambda d, _: ([Add.of(d, 1.0)], Scope("thinking", window=(4, None))),
        ),
    ],
)
def test_a_recipe_from_the_shell_is_the_one_written_in_python(facts, folder, tmp_path, options, make):
    d, e = (Direction.load(folder / f"{name}.safetensors") for name in "de")
    interventions, scope = make(d, e)
    expected = Recipe.of(load("organism"), interventions, scope=scope)
    assert facts(f"recipe organism {options} -o {tmp_path / 'r'}")["steps"] == len(expected.steps)
    made = Recipe.load(tmp_path / "r")
    assert made.fingerprint() == expected.fingerprint()
    expected.save(tmp_path / "again")
    assert (tmp_path / "r" / "recipe.yaml").read_text() == (tmp_path / "again" / "recipe.yaml").read_text()


def test_other_commands_take_the_recipe_that_was_made(facts, tmp_path):
    facts(f"recipe organism --add d.safetensors --strength 0.8 --scope thinking -o {tmp_path / 'r'}")
    plain = facts(f"generate organism -n 20 -o {tmp_path / 'plain.jsonl'}")
    steered = facts(f"generate organism -n 20 --recipe {tmp_path / 'r'} -o {tmp_path / 'steered.jsonl'}")
    assert steered["completions"] == 20
    assert steered["mean thinking tokens"] != plain["mean thinking tokens"]
    assert facts(f"evaluate organism -n 4 --draws 0 --recipe {tmp_path / 'r'}")[str(tmp_path / "r")]["n"] == 4
    assert facts(f"compare organism --prompt 'a 3 b +4' --recipe {tmp_path / 'r'}")["fired"]
    assert facts(f"show {tmp_path / 'r'}")["births"]


CONTRAST = "organism --positive quick.jsonl --negative slow.jsonl --site L2.resid_post"
SPLITS = "--n-select 3 --n-report 2"
JOBS = {
    "generate organism -n 5 --samples 2 -o {}/c.jsonl": 10,
    "compare organism --recipe recipe --prompt 'a 3' --prompt 'a 4'": 4,
    "evaluate organism -n 3 --samples 2 --control wait:1 --prompt empty-thinking --checkpoint organism": 24,
    "evaluate organism -n 3 --recipe recipe --draws 2": 32 + 3 * (2 + 4),
    f"sweep {CONTRAST} --strength 0.1 --strength 0.2 {SPLITS} --draws 2 -o {{}}/swept": 9 + 18,
    f"rice organism --strength 2 --strength 4 --control wait:1 --n-probe 40 {SPLITS} --draws 2 -o {{}}/r": 40 + 9 + 16,
    "thinkedit organism --heads 2 --kind replace --n-probe 60 --n-select 3 --n-report 25 --control-draws 2 "
    "--sweep 2 -o {}/t": 60 + 15 + 150 + 2 * 38 + 6,
}


@pytest.mark.parametrize(("words", "expected"), JOBS.items(), ids=[words.split()[0] for words in JOBS])
def test_a_job_generates_what_its_dry_run_told(facts, monkeypatch, tmp_path, words, expected):
    dry = facts(f"{words.format(tmp_path)} --dry-run")
    assert dry["completions"] == expected
    assert dry["max_tokens"] == expected * (256 if words.startswith("compare") else 48)
    assert dry["minutes"] > 0
    assert list(tmp_path.iterdir()) == []  # nothing was done
    done, write = [], Transformers.write

    def counted(engine, model, rows, *rest, **options):
        done.extend(rows)
        return write(engine, model, rows, *rest, **options)

    monkeypatch.setattr(Transformers, "write", counted)
    facts(words.format(tmp_path))
    examples = 6 if words.startswith("thinkedit") else 0  # of three kinds, where a run has them
    assert expected - examples <= len(done) <= expected


def test_one_bar_counts_a_whole_job(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    seen, model = [], load("organism")
    monkeypatch.setattr(_generate._Progress, "show", lambda _, bar, new: (bar.update(len(new)), seen.append(bar)))
    store = tmp_path / "c.jsonl"
    _generate.generate(model, ["a 3"], store=store)
    seen.clear()
    with progress(5, label="job"):
        _generate.generate(model, ["a 3", "a 4"], store=store)
        _generate.generate(model, ["a 3", "a 5", "a 6"])
    assert seen[0] is seen[1]
    assert (seen[0].n, seen[0].total) == (4, 4)  # one was held
