"""No command line ends in a traceback: what is wrong is told in a sentence, on one line, and with exit code 2."""

import json
import shlex
import sys
from collections.abc import Callable

import pytest
import torch

import probes.model
from probes.directions import direction_between
from probes.model import Site, load
from steer import Add, Recipe
from steer.cli.main import main
from steer.cli.refusals import sentence

Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files that are not what a command asks for, and a few that are."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "text.txt").write_text("no JSON\n")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "empty.jsonl").write_text("")
    (folder / "empty").mkdir()
    for name in ("cut.safetensors", "cut.gguf"):
        (folder / name).write_bytes(b"GGUF\x03\x00")
    for name, tail in (("slow", "? <think>"), ("quick", "quick ? <think>")):
        rows = [json.dumps({"text": f"a {i} b +4 {tail}"}) + "\n" for i in range(5)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    (folder / "numbers.jsonl").write_text("1\n2\n")
    model = load("organism")
    texts = ["a 3 b +4 quick", "a 4 quick"], ["a 3 b +4", "a 4"]
    direction_between(model, *texts, "L2.resid_post", position="text_last").save(folder / "d.safetensors")
    recipe = Recipe.of(model, [Add(Site(2, "resid_post"), torch.ones(96), 0.5)])
    recipe.save(folder / "recipe")
    other = Recipe(recipe.steps, {**recipe.model, "n_layers": 7}, "")
    other.save(folder / "others")
    return folder


@pytest.fixture
def run(monkeypatch, capsys, folder) -> Run:
    monkeypatch.chdir(folder)

    def steer(words):
        monkeypatch.setattr(sys, "argv", ["steer", *shlex.split(words)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return steer


CONTRAST = "organism --positive quick.jsonl --negative slow.jsonl"
WRONG = """
nonsense                                              | No such command 'nonsense'
--nonsense                                            | No such option: --nonsense
generate                                              | Missing argument 'model'
generate organism                                     | Missing option '--output'
select missing.jsonl                                  | missing.jsonl
select empty.jsonl                                    | answers none of the first 1000 problems of chains
select empty.jsonl --by lenght                        | --by 'lenght' is no signal. Known: net, cumulative
select empty.jsonl --by net                           | name the one that wrote the completions, --model.
select empty.jsonl --by 'failed steps'                | needs a check of each step
select empty.jsonl -o text.txt                        | text.txt exists. Name another file.
generate organism -o new -n 0                         | '--n' / '-n': it must be at least 1.
generate organism -o new -n -5                        | '--n' / '-n': it must be at least 1.
generate organism -o new -n many                      | '--n' / '-n': it must be a whole number.
generate organism -o new --samples 0                  | '--samples': it must be at least 1.
generate organism -o new --batch-size 0               | '--batch-size': it must be at least 1.
generate organism -o new --max-new-tokens 0           | '--max-new-tokens': it must be at least 1.
generate organism -o new --max-new-tokens -7          | '--max-new-tokens': it must be at least 1.
generate organism -o new --temperature nan            | '--temperature': nan is no finite number.
generate organism -o new --temperature -0.5           | '--temperature': -0.5 is below 0; 0 is greedy.
generate organism -o new --temperature warm           | '--temperature': it must be a number.
generate organism -o new --seed -1                    | '--seed': it must be at least 0.
generate organism -o new --seed 99999999999999999999  | '--seed': it must be at most 4294967295.
generate organism -o new --dtype float8               | --dtype float8 is unknown. Known: auto, float32
generate organism -o new --dtype int8                 | --dtype int8 is unknown.
generate organism -o new --device-map nowhere         | --device-map nowhere is unknown. Known: auto
generate organism -o new --device-map meta            | --device-map meta holds no numbers
generate organism -o new --split test                 | 'test' is not a split. Known: train, probe
generate organism -o new --delimiters x               | Option '--delimiters' requires 2 arguments.
generate organism -o new --task nothing               | 'nothing' is neither a task nor a JSONL file.
generate organism -o new --task empty                 | 'empty' is neither a task nor a JSONL file.
generate organism -o new --task text.txt              | Line 1 of text.txt is not JSON
generate organism -o new --task numbers.jsonl         | Line 1 of numbers.jsonl
generate organism -o new --task empty.jsonl           | empty.jsonl holds no problems.
generate organism -o new --task gsm8k:nothing         | nothing is not a folder.
generate organism -o new --recipe empty               | empty holds no recipe.yaml: it is not a recipe.
generate organism -o new --recipe others              | This recipe was made for the model 'organism'
generate organism -o empty                            | empty is a folder. Name a file.
generate organism -o text.txt -n 1                    | Line 1 of text.txt is no completion
generate organism -o text.txt/new                     | text.txt/new cannot be written: text.txt is a file.
generate empty -o new                                 | The folder empty holds no config.json
generate text.txt -o new                              | text.txt is a file, but not a GGUF file
generate ./nothing -o new                             | './nothing' is not a model: there is no such folder.
generate a/b/c -o new                                 | 'a/b/c' is not a model: there is no such folder.
generate nothing.gguf -o new                          | nothing.gguf does not exist.
generate cut.gguf -o new                              | cut.gguf
serve organism --recipe recipe                        | --recipe recipe has no name: give it as NAME=FOLDER.
serve organism --recipe r=others --dry-run            | This recipe was made for the model 'organism'
serve organism --recipe r=recipe --engine vroom       | --engine vroom is unknown. Known: transformers, vllm.
serve organism --recipe r=others --engine vllm --dry-run | This recipe was made for the model 'organism'
serve organism --engine vllm                          | --engine vllm needs vllm and thinksteer-vllm: pip install vllm
serve organism --engine vllm --max-tokens 9           | --max-tokens: --engine transformers alone reads it.
serve organism --probes 2                             | --probes: --engine vllm alone reads it.
serve organism -- --seed 1                            | What stands behind a --: --engine vllm alone reads it.
serve organism --engine vllm -- --port 1              | --port is not for vLLM's options: give --port before the --.
serve organism --engine vllm --dry-run --probes 9     | There are 8 prompts to probe with, but 9 are asked for.
serve organism --max-batch 0                          | '--max-batch': it must be at least 1.
parity organism nothing                               | nothing holds no recipe.yaml
parity organism others                                | This recipe was made for the model 'organism'
parity organism recipe --tolerance -1                 | '--tolerance': it must be at least 0.
compare organism --recipe recipe                      | Missing option '--prompt'
compare organism --recipe recipe --prompt             | Option '--prompt' requires an argument.
compare organism --recipe nothing --prompt a          | nothing holds no recipe.yaml
compare organism --recipe others --prompt a           | This recipe was made for the model 'organism'
compare organism --recipe recipe --prompt a --max-new-tokens 0 | '--max-new-tokens': it must be at least 1.
compare organism --recipe recipe --prompt a --temperature inf | '--temperature': inf is no finite number.
evaluate organism --draws -1                          | '--draws': it must be at least 0.
evaluate organism --recipe text.txt                   | text.txt holds no recipe.yaml
evaluate organism --recipe others                     | This recipe was made for the model 'organism'
evaluate organism --checkpoint nothing/is/there       | 'nothing/is/there' is not a model
evaluate organism --checkpoint empty                  | The folder empty holds no config.json
evaluate organism --store text.txt                    | --store text.txt is a file. Name a folder.
evaluate organism --control shout                     | 'shout' is not a decoding control
evaluate organism --control budget:nan                | 'nan' is no whole number.
evaluate organism --control close:nan                 | 'close:nan' is not a decoding control
evaluate organism --prompt length:-5                  | A length of -5 tokens cannot be asked for
evaluate organism --prompt length:x                   | 'x' is no whole number.
evaluate organism --prompt ellipsis                   | cannot write the thought
sweep CONTRAST --site L2.resid_post -o new            | Missing option '--strength'
sweep CONTRAST --site L2.resid_post -o new --strength nan | '--strength': nan is no finite number.
sweep CONTRAST --site L99.resid_post -o new --strength 1 | Layer 99 is out of range: the model has layers
sweep CONTRAST --site L2.nowhere -o new --strength 1  | 'L2.nowhere' is not a site.
sweep CONTRAST --site L2.resid_post -o new --strength 1 --scope where | 'where' is no scope. Known: all
sweep CONTRAST --site L2.resid_post -o new --strength 1 --n-select 0 | '--n-select': it must be at least 1.
sweep CONTRAST --site L2.resid_post -o empty --strength 1 | empty exists. Name another output folder
direction CONTRAST --site L99.resid_post -o new       | Layer 99 is out of range: the model has layers
direction CONTRAST --site L2 -o new                   | 'L2' is not a site.
direction CONTRAST --site L2.resid_post -o d.safetensors | d.safetensors exists. Name another output file
direction organism --positive nothing --negative slow.jsonl --site L2.resid_post -o new | nothing does not exist.
direction organism --positive empty --negative slow.jsonl --site L2.resid_post -o new | empty is a folder
direction organism --positive binary --negative slow.jsonl --site L2.resid_post -o new | binary
direction organism --positive empty.jsonl --negative slow.jsonl --site L2.resid_post -o new | .
recipe organism -o new                                | Give at least one direction, --add FILE or --ablate FILE
recipe organism -o empty --add d.safetensors          | empty exists. Name another output folder
recipe organism -o new --add nothing                  | nothing does not exist.
recipe organism -o new --add text.txt                 | text.txt is not a whole safetensors file
recipe organism -o new --add cut.safetensors          | cut.safetensors is not a whole safetensors file
recipe organism -o new --add empty                    | empty
recipe organism -o new --add d.safetensors --strength nan | '--strength': nan is no finite number.
recipe organism -o new --add d.safetensors --strength 1 --strength 2 | 2 of --strength came with 1 directions
recipe organism -o new --add d.safetensors --units norm | 'norm' is no unit. Known: stream, raw.
recipe organism -o new --add d.safetensors --scope where | 'where' is no scope. Known: all
recipe organism -o new --add d.safetensors --layers 3-1 | --layers 3-1 is no set of layers.
recipe organism -o new --add d.safetensors --layers 0-99 | Layer 4 is out of range
recipe organism -o new --add d.safetensors --layers x | --layers x is no set of layers.
recipe organism -o new --add d.safetensors --window 5 | --window 5 is no range of positions.
recipe organism -o new --add d.safetensors --window 0-5 | window is about the thinking: give it with --scope thinking
recipe organism -o new --add d.safetensors --scope thinking --window 5-5 | The window (5, 5)
show nothing                                          | nothing does not exist.
show empty                                            | empty holds no recipe.yaml
show text.txt                                         | text.txt is not a whole safetensors file
show numbers.jsonl                                    | numbers.jsonl
thinkedit organism -o empty                           | empty exists. Name another output folder
thinkedit organism -o new --share 0.9                 | '--share': 0.9 is not above 0 and below 0.5
thinkedit organism -o new --share 0.5                 | '--share': 0.5 is not above 0 and below 0.5
thinkedit organism -o new --share nan                 | '--share': nan is not above 0 and below 0.5
thinkedit organism -o new --short 9                   | Give both --short and --long, or neither
thinkedit organism -o new --short 9 --long 3          | --short 9 is above --long 3
thinkedit organism -o new --short nan --long 3        | '--short': nan is no finite number.
thinkedit organism -o new --heads 0                   | '--heads': 0 is neither a number of heads nor a share
thinkedit organism -o new --heads 1.5                 | '--heads': 1.5 is neither a number of heads nor a share
thinkedit organism -o new --heads 33                  | 33 heads are asked for, but the model has 32.
thinkedit organism -o new --kind nonsense             | 'nonsense' is not a kind of edit. Known: project
thinkedit organism -o new --kind one_sided            | --kind one_sided acts at run time
thinkedit organism -o new --control-draws 0           | '--control-draws': it must be at least 1.
thinkedit organism -o new --sweep -1                  | '--sweep': it must be at least 0.
thinkedit organism -o new --short 2 --long 3 --n-probe 20 | Give other --short and --long, or --share.
rice organism -o new --marker Wait                    | 'Wait' is not a signed marker.
rice organism -o new --marker +zzz --n-probe 5        | None of zzz occurs in the completions
rice organism -o new --top 0                          | '--top': it must be at least 1.
rice organism -o new --strength inf                   | '--strength': inf is no finite number.
rice organism -o new --scope where                    | 'where' is no scope.
demo smollm2                                          | There is no demo of 'smollm2', but of organism and
demo -o empty                                         | empty exists. Name another output folder
demo -n 0                                             | '--n' / '-n': it must be at least 1.
report nothing                                        | nothing holds no run.json
report empty -o empty                                 | empty is a folder. Name a file.
vector show organism-rl --figure empty                | empty is a folder. Name a file.
report empty -o text.txt/new                          | text.txt/new cannot be written: text.txt is a file.
organism -o new --steps 0                             | '--steps': it must be at least 1.
organism -o empty                                     | empty exists. Name another output folder
donors -o new --start ./nothing                       | './nothing' is not a model
donors -o text.txt/new                                | text.txt/new cannot be written
diff organism text.txt                                | text.txt is a file, but not a GGUF file
diff organism empty                                   | empty holds no model.safetensors
export recipe --to nothing -o new                     | 'nothing' is nothing to export to. Known: gguf
export recipe --to checkpoint -o new                  | --to checkpoint changes weights: name the model
export recipe --to gguf -o empty                      | empty exists.
export recipe --to gguf -o new --public               | --push-to and --public are for checkpoint and adapter
export others --to checkpoint --model organism -o new | This recipe was made for the model 'organism'
export nothing --to gguf -o new                       | nothing holds no recipe.yaml
import nothing organism -o new                        | nothing does not exist.
import text.txt organism -o new                       | What text.txt is, its name and keys do not tell.
import cut.gguf organism -o new                       | cut.gguf
import cut.gguf organism -o empty                     | empty exists.
vector make organism -o new                           | organism holds neither delta.yaml nor adapter_config.json
vector make organism text.txt -o new                  | text.txt is a file, but not a GGUF file
vector make organism organism -o new --dtype float8   | 'float8' is no dtype that a delta is stored in
vector make organism organism -o new --rank 0         | '--rank': it must be at least 1.
vector make organism organism -o empty                | empty exists.
vector show empty                                     | empty holds neither delta.yaml nor adapter_config.json
vector show organism-rl --against nothing             | nothing holds neither delta.yaml nor adapter_config.json
vector add organism organism-rl -o new --strength nan | '--strength': nan is no finite number.
vector add organism organism-rl -o new --only nothing | 'nothing' matches no tensor of the delta
vector add organism organism-rl -o empty              | empty exists.
vector add ./nothing organism-rl -o new               | './nothing' is not a model
vector to-mergekit organism organism-rl --method x    | 'x' is no method known here.
vector to-mergekit organism organism-rl -o empty      | empty exists.
"""
CASES = [tuple(part.strip() for part in line.split(" | ")) for line in WRONG.strip().splitlines()]


@pytest.mark.parametrize(("words", "told"), CASES, ids=[words for words, _ in CASES])
def test_a_wrong_command_line_is_told_in_one_line_and_leaves_nothing(run, folder, words, told):
    before = set(folder.iterdir()) | {folder / "new.completions"}  # which a run that goes on is to find
    code, _, err = run(words.replace("CONTRAST", CONTRAST))
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err
    assert "Traceback" not in err
    assert set(folder.iterdir()) <= before


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there_is_named(run):
    assert (
        "--device-map cuda names a device that this machine does not have"
        in run("generate organism -o new --device-map cuda")[2]
    )


def test_a_model_that_the_hub_does_not_give_is_told_without_its_pages(run, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co' ...\nCheck your internet connection")

    monkeypatch.setattr(probes.model, "load", unreachable)
    code, _, err = run("generate some/model -o new")
    assert (code, err.count("\n")) == (2, 1)
    assert "'some/model' is not on this machine, and the hub does not give it. Known: organism" in err


def test_a_fault_of_the_code_keeps_its_traceback_and_a_refusal_gets_one_on_request(run, monkeypatch):
    monkeypatch.setenv("THINKSTEER_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        run("show nothing")
    monkeypatch.delenv("THINKSTEER_TRACEBACK")

    def faulty(*_, **__):
        raise AssertionError("a fault")

    monkeypatch.setattr(probes.model, "load", faulty)
    with pytest.raises(AssertionError, match="a fault"):
        run("generate organism -o new")


@pytest.mark.parametrize("words", ["", "vector"])
def test_a_command_without_its_own_is_told_which_there_are(run, words):
    code, _, err = run(words)
    assert code == 2
    assert err.startswith("Usage: ")
    assert "show" in err


def test_an_interrupt_is_no_traceback(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(probes.model, "load", interrupted)
    code, _, err = run("generate organism -o new")
    assert code == 130
    assert err.startswith("stopped: ")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ValueError("Is it? If so, load it with delimiters=('<what opens the thinking>', '<what closes it>')."),
            "Is it? If so, give --delimiters '<what opens the thinking>' '<what closes it>'.",
        ),
        (ValueError("x steers layer 0, which shift=-1 moves"), "x steers layer 0, which --shift -1 moves"),
        (ValueError("samples is 0, but at least 1 is needed."), "--samples is 0, but at least 1 is needed."),
        (ValueError("two\nlines \x1b[31mand a colour"), "two lines \\x1b[31mand a colour"),
        (FileNotFoundError(2, "No such file or directory", "x"), "x does not exist."),
        (PermissionError(13, "Permission denied", "x"), "x cannot be used: Permission denied."),
        (NotImplementedError(), "NotImplementedError"),
    ],
)
def test_errors_are_told_in_the_words_of_a_command_line(error, told):
    assert sentence(error) == told
